"""The presets: what they say, what they build, and how single options come on top."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from fairclip_losses import (
    PRESETS,
    BadPairMiner,
    FairLoss,
    SinkhornFairnessLoss,
    build_fair_loss,
)
from fairclip_losses.functional import official_scores, pair_logits


def step(count=12, seed=0):
    draw = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(count, 6, generator=draw), dim=1).requires_grad_()
    text = F.normalize(torch.randn(count, 6, generator=draw), dim=1).requires_grad_()
    return {
        "image_features": image,
        "text_features": text,
        "logit_scale": torch.tensor(10.0),
        "pair_ids": torch.randperm(30, generator=draw)[:count],
        "groups": torch.randint(-1, 3, (count,), generator=draw),
    }


def test_the_names():
    assert list(PRESETS) == ["aligned", "paper", "official"]
    assert all(preset.description for preset in PRESETS.values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["paper"].fairness_weight = 1.0


def test_aligned_is_the_default():
    chosen = PRESETS["aligned"]
    fair = build_fair_loss(ClipLoss(), num_pairs=30, num_groups=3)
    by_hand = FairLoss(
        ClipLoss(),
        BadPairMiner(30, **chosen.miner),
        SinkhornFairnessLoss(num_groups=3, **chosen.fairness),
        chosen.fairness_weight,
    )
    assert (fair.score, fair.normalization, fair.mining_unit) == ("loss", "batch", "pair")
    assert (fair.miner.weighting, fair.miner.record) == ("relative", "raw")
    assert (fair.fairness.blur, fair.fairness.detach) == (0.0, "none")
    for epoch in range(3):
        for seed in range(4):
            got = fair(**step(seed=10 * epoch + seed))
            expected = by_hand(**step(seed=10 * epoch + seed))
            assert torch.equal(got.detach(), expected.detach())
        assert fair.end_epoch() == by_hand.end_epoch()


def test_paper_has_the_published_constants():
    fair = build_fair_loss(ClipLoss(), preset="paper", num_pairs=30, num_groups=3)
    miner, term = fair.miner, fair.fairness
    assert (miner.noisy_sigma, miner.faulty_sigma, miner.warmup_epochs) == (3.0, 3.0, 1)
    assert (miner.weighting, miner.record, miner.history) == ("density", "raw", "mean")
    assert (term.p, term.blur, term.group_reduction) == (2, 1e-4, "sum")
    assert (term.detach, term.divide_by_group_sum) == ("none", False)
    assert (fair.fairness_weight, fair.score, fair.mining_unit) == (1e-7, "loss", "pair")
    assert fair.normalization == "batch" and miner.num_pairs == 30


def test_official_is_the_published_code():
    fair = build_fair_loss(ClipLoss(), preset="official", num_pairs=30, num_groups=3)
    miner, term = fair.miner, fair.fairness
    assert (miner.weighting, miner.record, miner.num_pairs) == ("density", "weighted", None)
    assert (term.detach, term.divide_by_group_sum, term.group_reduction) == ("groups", True, "sum")
    assert (fair.score, fair.mining_unit, fair.fairness_weight) == ("official", "batch", 1e-7)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(preset):
    fair = build_fair_loss(ClipLoss(), preset=preset, num_pairs=30, num_groups=3)
    for seed in range(2):
        inputs = step(seed=seed)
        losses = fair(**inputs, output_dict=True)
        assert list(losses) == ["contrastive_loss", "fairness_loss"]
        sum(losses.values()).backward()
        assert torch.isfinite(inputs["image_features"].grad).all()
        fair.end_epoch()


def test_official_term_is_that_of_its_formula():
    inputs = step()
    fair = build_fair_loss(
        ClipLoss(), preset="official", num_groups=3, fairness_weight=1.0,
        fairness_options={"blur": 0.0},
    )  # fmt: skip
    got = fair(**inputs, output_dict=True)["fairness_loss"]
    names = ("image_features", "text_features", "logit_scale")
    scores = official_scores(pair_logits(*(inputs[name] for name in names)))
    groups = inputs["groups"]
    total = 0.0
    for g in range(3):
        members = scores[groups == g]
        assert len(members)
        total += _half_squared_distance(scores, (members / members.sum()).detach())
    torch.testing.assert_close(got, total, rtol=1e-4, atol=1e-4)


def _half_squared_distance(x, y):
    """W_2^2 / 2 of two uniform sets, by repeating each until the sizes agree."""
    many = x.repeat_interleave(len(y)).sort().values
    other = y.repeat_interleave(len(x)).sort().values
    return (many - other).square().mean() / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
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
def test_options_of_a_part_that_is_left_out_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_fair_loss(ClipLoss(), **options)


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
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_fair_loss(ClipLoss(), **options)


@pytest.mark.parametrize(
    ("epochs", "expected"), [(None, 1), (1, 1), (3, 1), (10, 1), (14, 2), (36, 5), (80, 11)]
)
def test_aligned_warms_up_for_a_seventh_of_the_training(epochs, expected):
    fair = build_fair_loss(ClipLoss(), num_pairs=9, num_groups=2, total_epochs=epochs)
    assert fair.miner.warmup_epochs == expected
    given = build_fair_loss(
        ClipLoss(),
        num_pairs=9,
        num_groups=2,
        total_epochs=epochs,
        miner_options={"warmup_epochs": 3},
    )
    assert given.miner.warmup_epochs == 3
    published = build_fair_loss(
        ClipLoss(), preset="paper", num_pairs=9, num_groups=2, total_epochs=epochs
    )
    assert published.miner.warmup_epochs == 1
