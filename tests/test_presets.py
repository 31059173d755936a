"""The presets: what they say, what they build, and how single options come on top."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from loss_cases import metadata, model_output
from open_clip.loss import ClipLoss

from fairclip_losses import (
    PRESETS,
    BadPairMiner,
    FairLoss,
    SinkhornFairnessLoss,
    build_fair_loss,
)


def step(seed):
    given = metadata(seed=seed)
    return model_output(seed=seed) | given | {"groups": given["groups"][:, 0]}


def test_the_names():
    assert list(PRESETS) == ["aligned", "paper", "official"]
    assert all(preset.description for preset in PRESETS.values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["paper"].fairness_weight = 1.0


def test_aligned_is_the_default():
    fair = build_fair_loss(ClipLoss(), num_pairs=40, num_groups=3)
    by_hand = FairLoss(ClipLoss(), BadPairMiner(40), SinkhornFairnessLoss(num_groups=3))
    assert fair.fairness_weight == by_hand.fairness_weight == 0.1
    assert (fair.score, fair.normalization, fair.mining_unit) == ("loss", "batch", "pair")
    assert (fair.miner.weighting, fair.miner.record) == ("relative", "raw")
    assert (fair.miner.noisy_sigma, fair.miner.faulty_sigma) == (3.0, 1.0)
    assert (fair.fairness.p, fair.fairness.blur, fair.fairness.detach) == (1, 0.0, "none")
    for epoch in range(3):
        for seed in range(4):
            got, expected = (loss(**step(10 * epoch + seed)) for loss in (fair, by_hand))
            assert torch.equal(got.detach(), expected.detach())
        assert fair.end_epoch() == by_hand.end_epoch()


@pytest.mark.parametrize(
    ("preset", "loss", "miner", "term"),
    [
        ("paper", ("loss", "pair"), ("raw", 30), (2, "none", False)),
        ("official", ("official", "batch"), ("weighted", None), (1, "groups", True)),
    ],
)
def test_the_published_constants(preset, loss, miner, term):
    fair = build_fair_loss(ClipLoss(), preset=preset, num_pairs=30, num_groups=3)
    mine, distance = fair.miner, fair.fairness
    assert fair.fairness_weight == 1e-7
    assert (fair.score, fair.mining_unit) == loss and fair.normalization == "batch"
    assert (mine.noisy_sigma, mine.faulty_sigma, mine.warmup_epochs) == (3.0, 3.0, 1)
    assert (mine.history, mine.weighting) == ("mean", "density")
    assert (mine.record, mine.num_pairs) == miner
    assert (distance.p, distance.blur, distance.group_reduction) == (2, 1e-4, "sum")
    assert (distance.min_group_size, distance.detach, distance.divide_by_group_sum) == term


def test_a_weighting_brings_its_detector():
    def miner(**options):
        return build_fair_loss(ClipLoss(), fairness=False, miner_options=options).miner

    assert miner(weighting="posterior").detector == "mixture"
    for weighting in ("relative", "density"):
        assert miner(weighting=weighting).detector == "threshold"
    assert miner(weighting="relative", detector="mixture").detector == "mixture"
    with pytest.raises(ValueError, match="faulty_sigma has no effect"):
        miner(weighting="posterior", faulty_sigma=2.0)


def test_what_describes_the_data_may_be_given_without_the_part():
    facts = {"num_pairs": 30, "total_epochs": 4, "num_groups": 3}
    empty = {"miner_options": {}, "fairness_options": {}}
    alone = build_fair_loss(ClipLoss(), mining=False, fairness=False, **facts, **empty)
    assert alone.miner is None and alone.fairness is None


def test_single_options_replace_the_presets():
    fair = build_fair_loss(
        ClipLoss(),
        preset="paper",
        num_pairs=30,
        total_epochs=7,
        num_groups=(3, 2),
        miner_options={"faulty_sigma": 1.5, "history": "linear", "total_epochs": 9},
        fairness_options={"p": 1, "queue_size": 5, "num_groups": 4},
        fairness_weight=0.0,
        score="similarity",
    )
    assert (fair.miner.faulty_sigma, fair.miner.noisy_sigma) == (1.5, 3.0)
    assert (fair.miner.history, fair.miner.total_epochs) == ("linear", 9)
    assert (fair.fairness.p, fair.fairness.queue_size, fair.fairness.blur) == (1, 5, 1e-4)
    assert fair.fairness.num_groups == (4,)
    assert (fair.fairness_weight, fair.score) == (0.0, "similarity")
    assert PRESETS["paper"].miner["faulty_sigma"] == 3.0  # the preset itself is as it was


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": ["paper"]}, r"preset must be one of .*, got \['paper'\]"),
        ({"preset": "ours"}, r"must be one of \['aligned', 'official', 'paper'\], got 'ours'"),
        ({"miner_options": {"faulty_sigma": -1.0}}, "faulty_sigma"),
        ({"fairness_options": {"p": 3}}, "p must be 1 or 2"),
        ({"score": "loses"}, "score must be one of"),
        ({"fairness_weight": -0.5}, "fairness_weight must be a finite number"),
        ({"miner_options": {"foo": 1}}, "num_pairs, .* of BadPairMiner, got 'foo'"),
        (
            {"fairness_options": {"blurr": 1, "x": 2}},
            ".* of SinkhornFairnessLoss, got 'blurr', 'x'",
        ),
        ({"miner_options": 3}, "miner_options must be a mapping name -> value, got int"),
        ({"total_epochs": "9"}, "total_epochs must be an integer of 1 or more, got '9'"),
        (
            {"mining": False, "miner_options": {"faulty_sigma": 1.0}},
            r"^miner_options needs mining=True, got mining=False and "
            r"miner_options=\{'faulty_sigma': 1.0\}$",
        ),
        (
            {"fairness": False, "fairness_options": {"blur": 0.0}},
            r"^fairness_options needs fairness=True, got fairness=False and",
        ),
        ({"fairness": False, "fairness_weight": 0.0}, "^fairness_weight needs fairness=True, got"),
        ({"fairness": False, "score": "similarity"}, "^score needs fairness=True, got"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_fair_loss(ClipLoss(), **options)


@pytest.mark.parametrize(
    ("epochs", "expected"), [(None, 1), (1, 1), (3, 1), (10, 1), (14, 2), (36, 5), (80, 11)]
)
def test_aligned_warms_up_for_a_seventh_of_the_training(epochs, expected):
    def warmup(**options):
        facts = {"num_pairs": 9, "num_groups": 2, "total_epochs": epochs}
        return build_fair_loss(ClipLoss(), **facts, **options).miner.warmup_epochs

    assert warmup() == expected
    assert warmup(miner_options={"warmup_epochs": 3}) == 3
    assert warmup(preset="paper") == 1
