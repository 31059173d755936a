"""Callbacks' state beside open_clip's checkpoints, on a stub of its program: rules and refusals."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_open_clip import make_saving_program
from stub_open_clip import registered as in_every_run

from fairclip_losses.errors import CallbackError, UsageError
from fairclip_losses.integrations.events import Callback
from fairclip_losses.integrations.open_clip import PROGRAM, parse_arguments, run_training


class Tally(Callback):
    """Keeps the weights it has seen, a count and what it was told of evaluations."""

    def __init__(self):
        self.seen, self.count, self.metrics = torch.zeros(0), 0, []

    def on_batch_end(self, state):
        self.seen = torch.cat([self.seen, state.model.weight.detach()[0, :1]])
        self.count += 1

    def on_eval_end(self, state):
        self.metrics.append(state.metrics["epoch"])

    def state_dict(self):
        return {"seen": self.seen, "more": OrderedDict(count=self.count), "metrics": self.metrics}

    def load_state_dict(self, state):
        self.seen, self.count = state["seen"].clone(), state["more"]["count"]
        self.metrics = list(state["metrics"])


def train(logs, *flags, callbacks=None):
    """One process's life: its callbacks begin anew."""
    callbacks = [Tally()] if callbacks is None else callbacks
    with pytest.MonkeyPatch.context() as patched, contextlib.ExitStack() as stack:
        patched.setitem(sys.modules, PROGRAM, make_saving_program())
        for callback in callbacks:
            stack.enter_context(in_every_run(callback))
        run_training(["--logs", str(logs), *flags])
    return callbacks[-1]


class Stops(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_batch_start(self, state):
        if state.epoch == self.epoch and state.batch_index == 2:
            raise KeyboardInterrupt


def epochs_of(folder, pattern):
    """The epochs that the files say they are of."""
    return {torch.load(path, weights_only=True)["epoch"] for path in folder.glob(pattern)}


EPOCHS = 5


@given(st.integers(0, 3), *[st.booleans()] * 3, st.integers(0, EPOCHS))
@settings(max_examples=25)
def test_states_follow_the_checkpoints_and_stopped_and_resumed_equals_uninterrupted(
    frequency, recent, deleting, evaluating, epoch
):
    flags = [
        *("--epochs", str(EPOCHS), "--save-frequency", str(frequency)),
        *["--save-most-recent"] * recent,
        *["--delete-previous-checkpoint"] * deleting,
        *["--val"] * evaluating,
    ]
    with tempfile.TemporaryDirectory() as root:
        whole = train(f"{root}/whole", *flags)
        with contextlib.suppress(KeyboardInterrupt):
            train(f"{root}/cut", *flags, callbacks=[Stops(epoch), Tally()])
        resumed = train(f"{root}/cut", "--resume", "latest", *flags)
        assert torch.equal(whole.seen, resumed.seen)
        assert (whole.count, whole.metrics) == (resumed.count, resumed.metrics)
        # In the end: a state for each checkpoint, and none besides.
        for name in ("whole", "cut"):
            folder = Path(root, name, "checkpoints")
            assert epochs_of(folder, "*.fair") == epochs_of(folder, "*.pt")
            assert len(list(folder.glob("*.fair*"))) == len(epochs_of(folder, "*.fair"))


def test_without_logs_or_state_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("none")
    train(tmp_path / "run", callbacks=[Callback()])
    assert not list(tmp_path.rglob("*.fair"))
    assert len(list(tmp_path.rglob("*.pt"))) == 3
    train(tmp_path / "run", "--resume", "latest", "--epochs", "4", callbacks=[Callback()])


@pytest.fixture
def saved(tmp_path):
    train(tmp_path, "--epochs", "2")
    return tmp_path


AGAIN = ("--resume", "latest", "--epochs", "3")


def put(change):
    """Return what changes the content of the file of epoch 2."""
    return lambda path: torch.save(change(torch.load(path, weights_only=True)), path)


NO_STATE = "epoch_2.fair is no saved state"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no saved state of epoch 2 beside the checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), NO_STATE),
        (
            lambda path: shutil.copy(path.with_name("epoch_1.fair"), path),
            "epoch_2.fair is the saved state of epoch 1, not 2",
        ),
        (put(lambda content: {"format": 1, "loss": {}}), "expected format 3, got 1"),
        (put(lambda content: torch.nn.Linear(1, 1)), NO_STATE),
        (put(lambda content: {"format": 3, "epoch": 2}), NO_STATE),
        (
            put(lambda content: content | {"callbacks": []}),
            f"{NO_STATE}: expected a dict of the state of each callback",
        ),
    ],
)
def test_a_missing_or_foreign_state_is_refused_with_the_way_on(saved, damage, message):
    damage(saved / "checkpoints" / "epoch_2.fair")
    with pytest.raises(UsageError, match=message) as caught:
        train(saved, *AGAIN)
    assert "add --fair-fresh-state to go on with fresh states" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (saved / "checkpoints" / "epoch_3.pt").exists()
    assert train(saved, *AGAIN, "--fair-fresh-state").count == 4


def test_the_latest_of_a_remote_folder_is_refused(registered):
    """open_clip lists such a folder without a look at the names, and takes the last."""
    args = argparse.Namespace(resume="latest", remote_sync="s3://bucket/logs")
    assert parse_arguments(lambda _: args, []) is args  # nobody keeps state
    registered(Tally())
    with pytest.raises(UsageError, match=r"--resume latest with --remote-sync .*name the check"):
        parse_arguments(lambda _: args, [])
    args.resume = "s3://bucket/logs/run/checkpoints/epoch_1.pt"
    assert parse_arguments(lambda _: args, []).resume == args.resume


def test_a_callback_that_is_new_is_refused_and_may_start_afresh_alone(saved, caplog):
    class Other(Tally):
        pass

    with pytest.raises(UsageError, match=r"no saved state of Other \(there is one of: Tally\)"):
        train(saved, *AGAIN, callbacks=[Tally(), Other()])
    kept, fresh = Tally(), Other()
    train(saved, *AGAIN, "--fair-fresh-state", "Other", callbacks=[kept, fresh])
    assert (kept.count, fresh.count) == (12, 4)
    again = torch.load(saved / "checkpoints" / "epoch_3.fair", weights_only=True)["callbacks"]
    assert list(again) == ["Tally", "Other"]
    train(saved, "--resume", "latest", "--epochs", "4", callbacks=[Other()])
    assert "The saved state of Tally is left" in caplog.text


def test_a_fresh_state_of_nobody_or_without_effect_is_refused(saved, tmp_path):
    with pytest.raises(UsageError, match=r"no callback Nobody keeps.*\(those that do: Tally\)"):
        train(saved, *AGAIN, "--fair-fresh-state", "Nobody")
    with pytest.raises(UsageError, match="--fair-fresh-state has no effect without --resume"):
        train(tmp_path, "--fair-fresh-state")
    with pytest.raises(UsageError, match="no effect: no callback keeps state in this run"):
        train(saved, *AGAIN, "--fair-fresh-state", callbacks=[Callback()])


def test_a_state_beside_a_checkpoint_at_an_address(saved):
    fsspec = pytest.importorskip("fsspec")
    from fairclip_losses.integrations.checkpoints import read_states

    memory = fsspec.filesystem("memory")
    memory.put(str(saved / "checkpoints"), "/bucket", recursive=True)
    assert read_states("memory://bucket/epoch_1.pt", 1)["Tally"]["more"]["count"] == 4
    with pytest.raises(UsageError, match="no saved state of epoch 3"):
        read_states("memory://bucket/epoch_1.pt", 3)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": np.float64(1)}, r"state\['a'\] is a numpy.float64"),
        ({"a": [1, {"b": np.zeros(2)}]}, r"state\['a'\]\[1\]\['b'\] is a numpy.ndarray"),
        ({np.int64(1): 1}, r"state, key .*1.* is a numpy.int64"),
        ({"a": Callback()}, r"state\['a'\] is a fairclip_losses.integrations.events.Callback"),
        (7, "state is a builtins.int; expected a dict"),
    ],
)
def test_what_could_not_be_read_back_is_refused_when_it_is_saved(tmp_path, value, where):
    class Odd(Tally):
        def state_dict(self):
            return value

    with pytest.raises(CallbackError, match=f"callback Odd failed at state_dict: {where}"):
        train(tmp_path, callbacks=[Odd()])
    assert not list((tmp_path / "checkpoints").iterdir())


def test_plain_values_come_back_as_they_were(tmp_path):
    value = {
        "none": None, "yes": True, "int": 2**70, "float": float("inf"), "complex": 1j, "text": "é",
        "bytes": b"\x00\xff", "half": torch.ones(1, dtype=torch.bfloat16), "empty": {}, 7: (1, [2]),
        "parameter": torch.nn.Parameter(torch.ones(1)), "ordered": OrderedDict(b=1, a=2),
    }  # fmt: skip
    back = {}

    class Keeper(Tally):
        def state_dict(self):
            return value

        def load_state_dict(self, state):
            back.update(state)

    train(tmp_path, "--epochs", "1", callbacks=[Keeper()])
    train(tmp_path, "--resume", "latest", "--epochs", "2", callbacks=[Keeper()])
    assert back == value and list(back) == list(value)
    assert [type(given) for given in back.values()] == [type(kept) for kept in value.values()]
    assert back["half"].dtype == torch.bfloat16


def test_a_full_disk_leaves_the_earlier_state_whole(tmp_path, monkeypatch):
    train(tmp_path, "--epochs", "1")
    before = (tmp_path / "checkpoints" / "epoch_1.fair").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path, "--epochs", "1")
    assert (tmp_path / "checkpoints" / "epoch_1.fair").read_bytes() == before
    assert {path.suffix for path in (tmp_path / "checkpoints").iterdir()} == {".fair", ".pt"}


def test_states_of_other_checkpoints_are_left_alone(tmp_path):
    """A run resumed without --save-most-recent keeps what an earlier one's latest needs."""
    train(tmp_path, "--epochs", "2", "--save-frequency", "0", "--save-most-recent")
    folder = tmp_path / "checkpoints"
    (folder / "epoch_2.pt").unlink()  # the final one; epoch_latest.pt is of epoch 2 as well
    train(tmp_path, "--resume", str(folder / "epoch_latest.pt"), "--epochs", "4")
    names = {path.name for path in folder.glob("*.fair")}
    assert names == {"epoch_2.fair", "epoch_3.fair", "epoch_4.fair"}


def test_what_a_killed_run_left_is_cleared_away_as_the_next_goes_on(tmp_path):
    counts, folder, counting = [], tmp_path / "checkpoints", Callback()
    counting.on_batch_end = lambda state: counts.append(len(list(folder.glob("*.fair*"))))
    train(tmp_path, "--epochs", "1", "--save-most-recent")
    for name in ("epoch_9.fair.tmp", "epoch_9.fair", "epoch_old.fair"):  # the last is none of ours
        (folder / name).touch()
    flags = ("--epochs", "6", "--save-frequency", "0", "--save-most-recent")
    train(tmp_path, *flags, "--resume", "latest", callbacks=[counting, Tally()])
    names = {path.name for path in folder.glob("*.fair*")}
    assert names == {"epoch_1.fair", "epoch_6.fair", "epoch_old.fair"}
    assert max(counts) == 3  # as open_clip keeps two checkpoints


def test_a_checkpoint_under_a_name_of_ones_own_keeps_its_state(saved):
    folder = saved / "checkpoints"
    (folder / "epoch_1.pt").rename(folder / "best.pt")
    for _ in range(2):
        assert train(saved, "--resume", str(folder / "best.pt"), "--epochs", "3").count == 12
    assert (folder / "epoch_1.fair").exists()
