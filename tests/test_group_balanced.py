"""The example of a callback that balances the batches."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_clip import write_data
from training_runs import arguments, registered

from fairclip_losses import train
from fairclip_losses.integrations.events import Callback

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from group_balanced import GroupBalancedSampler


@given(
    st.lists(st.integers(-1, 3), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
@settings(max_examples=40)
def test_batches_are_balanced_and_groups_are_gone_through(codes, batch_size, world_size, seed):
    codes = torch.tensor(codes)
    shares = [
        list(GroupBalancedSampler(codes, batch_size, 5, seed=seed, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert all(
        len(share) == 5 and {len(batch) for batch in share} == {batch_size} for share in shares
    )
    drawn = Counter()
    for parts in zip(*shares, strict=True):
        rows = [row for part in parts for row in part]
        sizes = Counter(codes[rows].tolist())
        assert max(sizes.values()) - min(sizes.get(c, 0) for c in codes.tolist()) <= 1
        drawn.update(rows)
    for code in set(codes.tolist()):
        visits = [drawn[row] for row in range(len(codes)) if codes[row] == code]
        assert max(visits) - min(visits) <= 1


def test_an_epoch_depends_on_its_number_and_the_seed_alone():
    codes = torch.arange(40) % 3
    sampler = GroupBalancedSampler(codes, 6, 4, seed=1)
    first = list(sampler)
    torch.rand(3)
    assert list(sampler) == first and len(sampler) == 4
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(GroupBalancedSampler(codes, 6, 4, seed=2)) != first


PAIRS, BATCH = 24, 6


class Groups(Callback):
    """Notes the groups and ids of every batch that the loss sees."""

    def __init__(self):
        self.batches = []

    def on_loss_end(self, state):
        groups = state.loss_inputs["groups"][:, 0].tolist()
        self.batches.append((state.epoch, state.loss_inputs["pair_ids"].tolist(), groups))


@pytest.fixture
def command(tmp_path):
    pytest.importorskip("open_clip_train.main")
    data = write_data(tmp_path, PAIRS)
    more = ("--batch-size", str(BATCH), "--fair-callback", "group_balanced:GroupBalancedBatches")
    return arguments(data, tmp_path, "run", *more)


@pytest.mark.filterwarnings("default")  # open_clip's own
def test_the_training_sees_balanced_batches_and_goes_on_with_them(command):
    def heard(*flags):
        with registered(Groups()) as callback:
            assert train.main([*command, "--fair-loss", "--fair-attributes", "sex", *flags]) == 0
        return callback.batches

    whole = heard("--name", "whole", "--epochs", "2")
    assert len(whole) == 2 * PAIRS // BATCH
    for _, _, groups in whole:
        assert Counter(groups) == {-1: 2, 0: 2, 1: 2}  # f, m and unknown
    assert heard("--epochs", "1", "--lr-scheduler", "const") == whole[: len(whole) // 2]
    assert heard("--epochs", "2", "--resume", "latest") == whole[len(whole) // 2 :]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "group_balanced needs --fair-attributes NAME"),
        (("--fair-attributes", "race"), "no column 'race'"),
        (("--fair-attributes", "sex", "--train-data", ""), "needs the CSV file of --train-data"),
        (("--fair-attributes", "sex", "--dataset-type", "synthetic"), "needs the CSV file of"),
    ],
)
def test_wrong_input_is_one_line(command, capsys, flags, message):
    assert train.main([*command, *flags]) == 2
    assert message in capsys.readouterr().err
