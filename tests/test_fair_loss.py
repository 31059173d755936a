"""FairLoss against open_clip's own losses, plain loops and an uninterrupted run."""

from __future__ import annotations

import copy
import io
import math
import pickle

import numpy as np
import ot
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    BASES,
    NUM_GROUPS,
    PAD,
    TOKENS,
    Fixed,
    LoopMiner,
    OwnLoss,
    assert_same_memory,
    gradients_of,
    metadata,
    model_output,
    parts,
)
from no_read_back import NoReadBack
from open_clip.loss import ClipLoss, CoCaLoss, SigLipLoss
from scipy.stats import wasserstein_distance
from torch import nn

from fairclip_losses import BadPairMiner, FairLoss, SinkhornFairnessLoss, build_fair_loss
from fairclip_losses.distributed import Processes
from fairclip_losses.losses import FairLossState
from fairclip_losses.pair_terms import PairTerms

SCORES = ("loss", "similarity", "official")

every_base = pytest.mark.parametrize("kind", BASES)
every_score = pytest.mark.parametrize("score", SCORES)
both_forms = pytest.mark.parametrize("output_dict", [True, False])


def terms_of(result):
    if isinstance(result, dict):
        return list(result.values())
    return list(result) if isinstance(result, tuple) else [result]


def total(result):
    return sum(terms_of(result))


def gradients(result, output):
    return gradients_of(total(result), output)


# ------------------------------ the base loss


def check_against_base(fair, kind, output, output_dict, given_metadata, compare):
    """Same form, values and gradients as the base loss, where a fairness term is 0."""
    base = BASES[kind]()(**output, output_dict=output_dict)
    got = fair(**output, output_dict=output_dict, **given_metadata)
    assert type(got) is type(base)
    if output_dict:
        fairness = got.pop("fairness_loss", None) if given_metadata else None
        assert fairness is None or torch.equal(fairness, torch.zeros(()))
        assert list(got) == list(base)
    for mine, theirs in zip(terms_of(got), terms_of(base), strict=True):
        compare(mine, theirs)
    for mine, theirs in zip(gradients(got, output), gradients(base, output), strict=True):
        compare(mine, theirs)


def to_rounding(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-5, equal_nan=True)


@every_base
@both_forms
def test_alone_it_is_the_base_loss_bit_for_bit(kind, output_dict):
    def exactly(mine, theirs):
        assert torch.equal(mine, theirs)

    output = model_output(kind)
    check_against_base(FairLoss(BASES[kind]()), kind, output, output_dict, {}, exactly)


@every_base
@settings(max_examples=15)
@given(
    count=st.integers(0, 12),
    seed=st.integers(0, 2**31),
    normalization=st.sampled_from(["batch", "weights"]),
    score=st.sampled_from(SCORES),
    output_dict=st.booleans(),
)
def test_nothing_flagged_and_weight_0_is_the_base_loss(
    kind, count, seed, normalization, score, output_dict
):
    fair = parts(kind, fairness_weight=0.0, normalization=normalization, score=score)
    output = model_output(kind, count, seed=seed)
    given_metadata = metadata(count, seed)
    check_against_base(fair, kind, output, output_dict, given_metadata, to_rounding)


@pytest.mark.parametrize("given_parts", [True, False])
def test_positional_arguments_have_the_names_of_the_base_loss(given_parts):
    output, given_metadata = model_output("siglip"), metadata() if given_parts else {}
    fair = parts("siglip") if given_parts else FairLoss(SigLipLoss())
    image, *rest = output.values()
    expected = fair(**output, **given_metadata, output_dict=True)
    named = dict(list(output.items())[1:])
    for got in (
        fair(*output.values(), True, **given_metadata),
        fair(image, **named, **given_metadata, output_dict=True),
    ):
        assert got.keys() == expected.keys()
        assert torch.equal(got["contrastive_loss"], expected["contrastive_loss"])
    with pytest.raises(TypeError, match="multiple values for argument 'image_features'"):
        fair(image, **output, **given_metadata)
    with pytest.raises(TypeError, match="too many positional arguments"):
        fair(image, *rest, *rest, **given_metadata)


@pytest.mark.parametrize(
    ("kind", "forward", "both"), [("clip", 1, 3), ("siglip", 1, 3), ("coca", 1, 3),
                                  ("distill", 2, 6)]
)  # fmt: skip
def test_the_contrastive_loss_is_computed_once(kind, forward, both):
    """One matrix of logits (a second of the teacher), its gradient by two products of each."""
    fair, output = parts(kind), model_output(kind)
    fair.base_loss.forward = None  # never called
    with NoReadBack() as counted:
        result = total(fair(**output, **metadata()))
        assert counted.calls["mm"] == forward
        result.backward()
    assert counted.calls["mm"] == both
    softmaxes = {"coca": 1, "distill": 2}.get(kind, 0)  # of the captions; both sides of the student
    assert counted.calls["_log_softmax"] == softmaxes


@every_base
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("place", ["image_features", "text_features", "logit_scale"])
@every_score
def test_what_is_not_finite_comes_out_as_the_base_gives_it(kind, bad, place, score):
    fair = parts(kind, fairness_weight=0.0, score=score)
    output = model_output(kind)
    with torch.no_grad():
        if place == "logit_scale":
            output[place].fill_(bad)
        else:
            output[place][2, 3] = bad
    base = BASES[kind]()(**output, output_dict=True)
    got = fair(**output, output_dict=True, **metadata())
    assert torch.equal(got.pop("fairness_loss"), torch.zeros(()))
    for mine, theirs in zip(terms_of(got), terms_of(base), strict=True):
        assert torch.isfinite(mine) == torch.isfinite(theirs)
    finite = [torch.isfinite(g).all() for g in gradients(got, output)]
    for mine, theirs in zip(finite, gradients(base, output), strict=True):
        assert mine == torch.isfinite(theirs).all()
    assert torch.isfinite(fair.miner.memory.loss_sum).all()
    assert torch.isfinite(fair.miner.memory.last_loss).all()
    held = fair.fairness.queue[~fair.fairness.queue.isnan()]
    assert torch.isfinite(held).all()
    # The next good batch is what it would have been, but for the visits that were finite.
    later = fair(**model_output(kind, seed=1), **metadata(seed=1), output_dict=True)
    assert torch.isfinite(total(later))


# ------------------------------ re-weighting


@every_base
@pytest.mark.parametrize("normalization", ["batch", "weights"])
@settings(max_examples=15)
@given(count=st.integers(1, 9), seed=st.integers(0, 2**31), output_dict=st.booleans())
def test_weights_by_a_double_loop(kind, normalization, count, seed, output_dict):
    draw = np.random.default_rng(seed)
    weights = np.where(draw.random(40) < 0.4, draw.random(40) * 2, 1.0)
    output = model_output(kind, count, seed=seed, dtype=torch.float64)
    miner = Fixed(torch.tensor(weights))
    fair = FairLoss(BASES[kind](), miner, normalization=normalization)
    ids = metadata(count, seed)["pair_ids"]
    result = fair(**output, pair_ids=ids, output_dict=output_dict)
    w = weights[ids.numpy()]
    expected = list(loop_terms(kind, output, w / (count if normalization == "batch" else w.sum())))
    assert not output_dict or list(result) == list(BASES[kind]()(**output, output_dict=True))
    values = [float(value.detach()) for value in terms_of(result)]
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-10)


def loop_terms(kind, output, share):
    """Yield sum_i share_i * term_i of every term, each from its definition."""
    value = {k: v.detach().numpy() for k, v in output.items()}
    count = len(share)
    logits = value["logit_scale"] * value["image_features"] @ value["text_features"].T
    logits = logits + value.get("logit_bias", 0.0)

    def log_softmax(row):
        return row - row.max() - math.log(np.exp(row - row.max()).sum())

    if kind == "siglip":
        loss = np.zeros(count)
        for i in range(count):
            for j in range(count):
                sign = 1.0 if i == j else -1.0
                term = np.logaddexp(0.0, -sign * logits[i, j])
                loss[i] += term / 2
                loss[j] += term / 2
        yield float(share @ loss)
        return
    clip = np.array(
        [-(log_softmax(logits[i])[i] + log_softmax(logits[:, i])[i]) / 2 for i in range(count)]
    )
    yield float(share @ clip) * (0.5 if kind == "coca" else 1.0)
    if kind == "coca":
        tokens = (value["labels"] != PAD).sum()
        caption = np.zeros(count)
        for i in range(count):
            for t in range(TOKENS):
                label = value["labels"][i, t]
                if label != PAD:
                    caption[i] -= log_softmax(value["logits"][i, t])[label] * count / tokens
        yield 2.0 * float(share @ caption)
    if kind == "distill":
        teacher = value["dist_image_features"] @ value["dist_text_features"].T
        teacher = value["dist_logit_scale"] * teacher
        loss = np.zeros(count)
        for i in range(count):
            for t, s in ((teacher[i], logits[i]), (teacher[:, i], logits[:, i])):
                loss[i] -= np.exp(log_softmax(t)) @ log_softmax(s) / 2
        yield float(share @ loss)


def test_a_miner_over_epochs_by_a_loop():
    """Batches in another order every epoch; the loop keeps a list of losses for each pair."""
    sigmas = {"noisy_sigma": 1.0, "faulty_sigma": 1.0}
    fair, loop = FairLoss(ClipLoss(), BadPairMiner(24, **sigmas)), LoopMiner(**sigmas)
    whole = model_output(count=24, dim=5, scale=4.0, dtype=torch.float64)
    weights_seen = set()
    for _ in range(3):
        for ids in torch.randperm(24).split(6):
            output = {name: v[ids] if v.dim() else v for name, v in whole.items()}
            losses = loop_scores("loss", output)
            weights = loop.visit(ids.tolist(), losses.tolist())
            got = float(fair(**output, pair_ids=ids).detach())
            assert got == pytest.approx(np.mean(weights * losses), rel=1e-5)
            weights_seen.update(weights)
        summary = fair.end_epoch()
        loop.end_epoch()
        assert summary.noisy + summary.faulty == len(loop.kinds) > 0
    assert len(weights_seen) > 3


# ------------------------------ the fairness term


def loop_scores(kind, output):
    value = {k: v.detach().double() for k, v in output.items()}
    logits = value["logit_scale"] * value["image_features"] @ value["text_features"].T
    if kind == "similarity":
        return logits.diagonal().numpy()
    if kind == "official":
        return (logits @ logits.T.T).diagonal().numpy()
    target = torch.arange(len(logits))
    each = F.cross_entropy(logits, target, reduction="none")
    return ((each + F.cross_entropy(logits.T, target, reduction="none")) / 2).numpy()


@every_score
@pytest.mark.parametrize("p", [1, 2])
@settings(max_examples=15)
@given(count=st.integers(1, 12), seed=st.integers(0, 2**31), weight=st.floats(1e-6, 10))
def test_fairness_term_by_a_loop_over_groups(score, p, count, seed, weight):
    output = model_output(count=count, seed=seed, dtype=torch.float64)
    groups = metadata(count, seed)["groups"]
    term = SinkhornFairnessLoss(p=p, num_groups=NUM_GROUPS)
    fair = FairLoss(ClipLoss(), fairness=term, fairness_weight=weight, score=score)
    result = fair(**output, groups=groups, output_dict=True)
    scores = loop_scores(score, output)
    expected = 0.0
    for c, number in enumerate(NUM_GROUPS):
        distances = []
        for g in range(number):
            members = scores[groups[:, c].numpy() == g]
            if len(members) > 1 and p == 1:
                distances.append(wasserstein_distance(scores, members))
            elif len(members) > 1:
                distances.append(ot.emd2_1d(scores, members) / 2)
        expected += weight * np.mean(distances) / len(NUM_GROUPS) if distances else 0.0
    scale = weight * (1 + np.abs(scores).max() ** p)
    assert float(result["fairness_loss"].detach()) == pytest.approx(
        expected, rel=1e-6, abs=1e-10 * scale
    )
    to_rounding(result["contrastive_loss"], ClipLoss()(**output))


@every_base
def test_dict_and_plain_forms_agree(kind):
    output, given_metadata = model_output(kind), metadata()
    as_dict = parts(kind)(**output, **given_metadata, output_dict=True)
    plain = parts(kind)(**output, **given_metadata)
    assert list(as_dict) == [*BASES[kind]()(**output, output_dict=True), "fairness_loss"]
    assert all(name.endswith("_loss") for name in as_dict)
    assert all(value.shape == () for value in as_dict.values())
    torch.testing.assert_close(total(plain), total(as_dict))
    first = plain[0] if isinstance(plain, tuple) else plain
    torch.testing.assert_close(first, as_dict["contrastive_loss"] + as_dict["fairness_loss"])
    for a, b in zip(gradients(plain, output), gradients(as_dict, output), strict=True):
        torch.testing.assert_close(a, b)


def test_scores_that_are_not_finite_leave_the_term_of_the_others():
    output = model_output()
    with torch.no_grad():
        output["image_features"][4] = math.nan
    groups = metadata()["groups"]
    term = SinkhornFairnessLoss(num_groups=NUM_GROUPS)
    fair = FairLoss(ClipLoss(), fairness=term, score="similarity")
    got = fair(**output, groups=groups, output_dict=True)["fairness_loss"]
    keep = torch.arange(10) != 4
    rest = {k: v[keep] if v.dim() else v for k, v in output.items()}
    expected = fair(**rest, groups=groups[keep], output_dict=True)["fairness_loss"]
    torch.testing.assert_close(got, expected)


def test_last_holds_what_the_call_saw():
    output, given_metadata = model_output(), metadata()
    fair = parts()
    assert fair.last is None
    fair(**output, **given_metadata)
    assert isinstance(fair.last, FairLossState)
    np.testing.assert_allclose(fair.last.pair_losses, loop_scores("loss", output), rtol=1e-5)
    assert torch.equal(fair.last.weights, torch.ones(10))
    assert fair.last.fairness.per_group.shape == (5,)
    assert not fair.last.pair_losses.requires_grad
    miner_alone = FairLoss(ClipLoss(), BadPairMiner(40))
    miner_alone(**output, pair_ids=given_metadata["pair_ids"])
    assert miner_alone.last.fairness is None


# ------------------------------ what is recorded


@pytest.mark.parametrize("num_pairs", [40, None])
def test_recording(num_pairs):
    output, given_metadata = model_output(), metadata()
    fair = parts(num_pairs=num_pairs)

    def state():
        held = ~fair.fairness.queue.isnan()
        return int(fair.miner.report().visits.sum()), int(held[0].sum())

    fair(**output, **given_metadata, record=False)
    assert state() == (0, 0)
    fair.eval()
    fair(**output, **given_metadata)
    assert state() == (0, 0)
    fair(**output, **given_metadata, record=True)
    assert state() == (10, 4)
    fair.train()
    fair(**output, **given_metadata)
    assert state() == (20, 4)


def test_evaluation_needs_no_ids():
    fair = parts().eval()
    output, groups = model_output(), metadata()["groups"]
    expected = FairLoss(ClipLoss(), fairness=SinkhornFairnessLoss(num_groups=NUM_GROUPS))(
        **output, groups=groups
    )
    assert torch.equal(fair(**output, groups=groups).detach(), expected.detach())


@every_base
@both_forms
def test_evaluation_without_groups_leaves_the_fairness_term_out(kind, output_dict):
    """A validation loop that knows pairs alone sees the base loss, and no term that is 0."""
    for score in ("loss", "similarity"):
        fair, output = parts(kind, score=score).eval(), model_output(kind)
        check_against_base(fair, kind, output, output_dict, {}, to_rounding)
        assert fair.last.fairness is None and bool((fair.last.weights == 1).all())
    ids = metadata()["pair_ids"]
    assert "fairness_loss" not in fair(**output, pair_ids=ids, output_dict=True)
    with pytest.raises(ValueError, match="the fairness term needs groups"):
        fair(**output, pair_ids=ids, record=True)  # what the queue would lack
    assert not fair.miner.memory.visits.any()


# ------------------------------ the published unit: the batch by its position


@pytest.mark.parametrize("accumulated", [False, True])
@settings(max_examples=3)
@given(seed=st.integers(0, 2**31))
def test_batch_unit_by_a_loop(accumulated, seed):
    """One mean loss a position in the epoch; a flagged one is weighed, and stored, as weighed."""
    sigma, sizes = 0.8, (7, 7, 7, 7, 3)
    options = {"noisy_sigma": sigma, "faulty_sigma": sigma}
    fair = build_fair_loss(
        ClipLoss(), preset="official", num_pairs=31, fairness=False, miner_options=options
    )
    stored = {position: [] for position in range(len(sizes))}
    flagged, mean, std = set(), 0.0, 1.0
    for epoch in range(4):
        for position, size in enumerate(sizes):
            output = model_output(count=size, dim=3, seed=(seed + 31 * epoch + position) % 2**31)
            base = float(ClipLoss()(**output).detach())
            weight = 1.0
            if position in flagged:
                density = math.exp(-(((base - mean) / std) ** 2) / 2)
                weight = density / (std * math.sqrt(2 * math.pi))
            if accumulated:  # the same batch once before, only read
                before = fair(**output, pair_ids=torch.arange(size), record=False)
            got = fair(**output, pair_ids=torch.arange(size))
            assert not accumulated or torch.equal(before.detach(), got.detach())
            expected = pytest.approx(weight * base, rel=1e-5, abs=2e-6 * base)
            assert float(got.detach()) == expected
            seen = fair.eval()(**output).detach()  # reads the position recorded last again
            assert torch.equal(seen, got.detach()) and fair.train()
            stored[position].append(weight * base)
        assert int(fair.batch_position) == len(sizes)
        fair.end_epoch()
        assert int(fair.batch_position) == 0
        history = {position: np.mean(values) for position, values in stored.items()}
        mean, std = np.mean(list(history.values())), np.std(list(history.values()))
        distances = {position: (m - mean) / std for position, m in history.items()}
        if any(abs(abs(z) - sigma) < 1e-3 for z in distances.values()):
            return  # a history on the threshold: float32 may flag it or not
        flagged = {position for position, z in distances.items() if abs(z) >= sigma}


# ------------------------------ state


@pytest.mark.parametrize("preset", ["aligned", "paper", "official"])
@pytest.mark.parametrize("num_pairs", [40, None])
@pytest.mark.parametrize("stop", [2, 15, 18])  # the last between epochs
def test_resumed_equals_uninterrupted(preset, num_pairs, stop):
    history = "linear" if preset == "aligned" else "mean"

    def build():
        return build_fair_loss(
            ClipLoss(),
            preset=preset,
            num_pairs=num_pairs,
            num_groups=NUM_GROUPS,
            miner_options={"noisy_sigma": 0.8, "faulty_sigma": 0.8, "history": history},
            fairness_options={"queue_size": 5, "blur": 0.0},
            fairness_weight=0.5,
        )

    def run(fair, steps):
        results = []
        for step in steps:
            result = fair(**model_output(seed=step), **metadata(seed=step % 7), output_dict=True)
            results.append([value.detach() for value in result.values()])
            if step % 6 == 5:
                fair.end_epoch()
        return results

    whole = build()
    expected = run(whole, range(22))
    first = build()
    run(first, range(stop))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = build()
    run(second, [30])  # what it held is gone once it loads
    second.load_state_dict(torch.load(file, weights_only=True))
    resumed = run(second, range(stop, 22))
    for got, want in zip(resumed, expected[stop:], strict=True):
        assert all(map(torch.equal, got, want))
    assert any((whole.last.weights != 1).tolist()) or preset != "aligned"
    assert_same_memory(second, whole)


def test_copies_and_pickles():
    fair = parts()
    fair(**model_output(), **metadata())
    for other in (copy.deepcopy(fair), pickle.loads(pickle.dumps(fair))):
        step = model_output(seed=1) | metadata(seed=1)
        assert torch.equal(other(**step).detach(), copy.deepcopy(fair)(**step).detach())


# ------------------------------ a loss of one's own


class PlainLoss(OwnLoss):
    def forward(self, distances):
        return distances.square().mean()


@pytest.mark.parametrize("base", [OwnLoss, PlainLoss])
def test_a_loss_of_ones_own(base):
    distances = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    step = {"distances": distances, "pair_ids": torch.arange(3)}
    fair = FairLoss(base(), Fixed(torch.tensor([1.0, 0.5, 0.0])))
    for output_dict in (False, True):
        got = fair(**step, output_dict=output_dict)
        got = got["distance_loss"] if output_dict else got
        assert float(got.detach()) == pytest.approx((1 + 0.5 * 4 + 0) / 3)
    assert float(FairLoss(base())(distances=distances).detach()) == pytest.approx(14 / 3)


def test_several_terms_of_ones_own_come_as_a_tuple_in_their_order():
    fair = FairLoss(OwnLoss("a_loss", "b_loss"), Fixed(torch.tensor([2.0, 0.0])))
    step = {"distances": torch.tensor([3.0, math.nan]), "pair_ids": torch.arange(2)}
    assert fair(**step) == (9.0, 9.0)  # the pair of weight 0 is left out, whatever it is
    assert fair(**step, output_dict=True) == {"a_loss": 9.0, "b_loss": 9.0}


def test_any_module_will_do_alone():
    alone = FairLoss(nn.Identity())
    assert torch.equal(alone(input=torch.ones(2)), torch.ones(2)) and alone.end_epoch() is None


# ------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fairness_weight": -1.0}, "fairness_weight must be a finite number >= 0, got -1.0"),
        ({"fairness_weight": math.nan}, "fairness_weight must be a finite number >= 0, got nan"),
        ({"fairness_weight": math.inf}, "fairness_weight must be a finite number >= 0, got inf"),
        ({"fairness_weight": "a"}, "fairness_weight must be a finite number >= 0, got 'a'"),
        ({"fairness_weight": None}, "fairness_weight must be a finite number >= 0, got None"),
        ({"miner": 3}, "miner must be a torch.nn.Module or None, got int"),
        ({"fairness": "a"}, "fairness must be a torch.nn.Module or None, got str"),
        ({"score": "losses"}, "score must be one of loss, similarity, official, got 'losses'"),
        ({"normalization": "sum"}, "normalization must be one of .*, got 'sum'"),
        ({"mining_unit": "epoch"}, "mining_unit must be one of .*, got 'epoch'"),
        ({"fairness_start": -1}, "fairness_start must be an integer of 0 or more, got -1"),
        ({"fairness_start": 1.5}, "fairness_start must be an integer of 0 or more, got 1.5"),
        ({"fairness_limit": -0.1}, "fairness_limit must be a number of 0 or more .*, got -0.1"),
        ({"fairness_limit": math.nan}, "fairness_limit must be a number of 0 or more .*, got nan"),
        ({"base_loss": None}, "base_loss must be a torch.nn.Module, got NoneType"),
        ({"base_loss": lambda **_: 0}, "base_loss must be a torch.nn.Module, got function"),
        ({"base_loss": ClipLoss}, "base_loss must be a torch.nn.Module, got type"),
        ({"base_loss": ClipLoss(world_size=2), "score": "official"}, "comparisons in one process"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        FairLoss(**({"base_loss": ClipLoss()} | options))


@pytest.mark.parametrize("weight", [0, 0.0])
@pytest.mark.parametrize("unit", ["pair", "batch"])
def test_mining_by_a_loss_that_nobody_trains_is_refused(weight, unit):
    base = CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=weight)
    with pytest.raises(ValueError, match="CoCaLoss with clip_loss_weight=0 does not train"):
        FairLoss(base, BadPairMiner(), mining_unit=unit)
    FairLoss(base, fairness=SinkhornFairnessLoss())
    base.pair_terms = lambda **out: None  # says itself what is mined
    FairLoss(base, BadPairMiner(), mining_unit=unit)


def code_2(groups):
    groups = groups.clone()
    groups[4, 1] = 2
    return groups


IDS, GROUPS = metadata().values()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pair_ids": None}, r"the miner needs pair_ids \(B,\), got None"),
        ({"groups": None}, r"the fairness term needs groups \(B,\), .* got None"),
        ({"pair_ids": IDS.tolist()}, "pair_ids must be a tensor, got list"),
        ({"pair_ids": IDS.float()}, "pair_ids must be integers"),
        ({"pair_ids": IDS[:3]}, r"must both have shape \(B,\)"),
        ({"pair_ids": IDS[:, None]}, r"must both have shape \(B,\)"),
        ({"groups": GROUPS.tolist()}, "group codes must be a tensor, got list"),
        ({"groups": GROUPS[:3]}, "10 scores, 3 rows"),
        ({"groups": GROUPS[:, :1]}, "expected codes of 2 attributes, got 1"),
        ({"groups": GROUPS.float()}, "group codes must be integers"),
        ({"groups": code_2(GROUPS)}, r"attribute 1: .* -1\.\.1 .* got 2 at position 4"),
        ({"groups": {"a": GROUPS[:, 0], "b": GROUPS[:3, 1]}}, "must have one shape"),
    ],
)
@pytest.mark.parametrize("num_pairs", [40, None])
def test_metadata_that_does_not_fit_is_recorded_nowhere(num_pairs, wrong, message):
    fair, clean = (parts(num_pairs=num_pairs) for _ in range(2))
    step = model_output() | metadata()
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            fair(**(step | wrong))
        assert_same_memory(fair, clean)
        if num_pairs:
            with pytest.raises(ValueError, match=r"must lie in 0\.\.39, got 40 at position 7"):
                fair(**(step | {"pair_ids": IDS.index_fill(0, torch.tensor([7]), 40)}))
        # Repaired and passed again, the batch counts once.
        assert torch.equal(fair(**step), clean(**step))
        assert_same_memory(fair, clean)


@pytest.mark.parametrize("unit", ["pair", "batch"])
def test_what_comes_late_is_refused_before_anything_is_recorded(unit):
    """Features for the scores, terms of other lengths, positions past the end."""
    miner = BadPairMiner(1 if unit == "batch" else 40)
    fairness = SinkhornFairnessLoss(num_groups=1, queue_size=2)
    fair = FairLoss(OwnLoss(), miner, fairness, mining_unit=unit)
    step = {
        "distances": torch.arange(3.0),
        "pair_ids": torch.arange(3),
        "groups": torch.zeros(3, dtype=torch.int64),
    }
    before = copy.deepcopy(fair)
    fair.score = "similarity"
    with pytest.raises(ValueError, match="needs image_features, text_features, logit_scale in"):
        fair(**step)
    fair.score, fair.base_loss = "loss", Uneven()
    with pytest.raises(ValueError, match=r"B = 3, got distance_loss of shape \(2,\)"):
        fair(**step)
    assert_same_memory(fair, before)
    fair.base_loss = OwnLoss()
    fair(**step)
    assert miner.report().visits.sum() == (1 if unit == "batch" else 3)
    if unit == "batch":
        before = copy.deepcopy(fair)
        with pytest.raises(ValueError, match=r"must lie in 0\.\.0, got 1"):
            fair(**step)
        assert_same_memory(fair, before)


class Uneven(OwnLoss):
    def pair_terms(self, distances):
        return PairTerms(distances, {"distance_loss": distances[:2]})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pair_ids": IDS.tolist()}, "pair_ids must be a tensor, got list"),
        ({"pair_ids": IDS[:3]}, r"pair_ids must have one row for each of the 10 pairs .*\(3,\)"),
        ({"pair_ids": IDS.float()}, "pair_ids must be integers"),
        ({"pair_ids": None}, "the miner needs pair_ids"),
        ({"groups": GROUPS.tolist()}, "group codes must be a tensor, got list"),
        ({"groups": {"a": GROUPS[:, 0], "b": GROUPS[:3, 1]}}, r"'a': \(10,\), 'b': \(3,\)"),
        ({"groups": GROUPS[:3]}, r"groups must have one row for each of the 10 pairs .*\(3, 2\)"),
        ({"text_features": torch.ones(9, 4)}, "must have one shape"),
        ({"image_features": None}, "several processes need image_features"),
    ],
)
def test_what_cannot_be_gathered_is_refused_without_an_exchange(monkeypatch, wrong, message):
    fair = parts()
    monkeypatch.setattr(Processes, "of_group", lambda: Processes(0, 2))
    vars(fair.base_loss).update(rank=0, world_size=2)
    with pytest.raises(ValueError, match=message):
        fair(**(model_output() | metadata() | wrong))
    assert not fair.miner.memory.visits.any() and fair.fairness.queue.isnan().all()


# ------------------------------ precision, devices, compilation

CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double and back": lambda module: module.double().float(),
    "to": lambda module: module.to(torch.bfloat16),
    "to device and dtype": lambda module: module.to("cpu", torch.float16),
    "type": lambda module: module.type(torch.float16),  # casts integers too
}


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_pairs", [40, None])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_no_cast_touches_the_state(cast, num_pairs, default):
    def made():
        return parts(num_pairs=num_pairs, history="linear")

    step = model_output() | metadata()
    plain = made()
    torch.set_default_dtype(default)
    try:
        model = nn.ModuleDict({"loss": made(), "tower": nn.Linear(2, 2)})
        fair = cast(model)["loss"]
    finally:
        torch.set_default_dtype(torch.float32)
    for _ in range(2):
        assert torch.equal(fair(**step), plain(**step))
        fair.end_epoch(), plain.end_epoch()
        cast(model)
    assert_same_memory(fair, plain)
    assert not list(fair.buffers())  # DistributedDataParallel would broadcast them
    again = made()
    state = fair.state_dict().items()
    double = {name: value.double() if "loss" in name else value for name, value in state}
    again.load_state_dict(double, assign=True)
    assert again.miner.memory.loss_sum.dtype == torch.float32
    assert torch.equal(again(**step), plain(**step))


@every_base
@every_score
def test_autocast(kind, score):
    fair = parts(kind, score=score)
    output = model_output(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = fair(**output, **metadata(), output_dict=True)
        base = BASES[kind]()(**output, output_dict=True)
    assert result["fairness_loss"].dtype == torch.float32
    for name, value in base.items():
        # open_clip's distillation is rounded to bfloat16, these terms are not.
        near = 1e-2 if name == "distill_loss" else 1e-3
        torch.testing.assert_close(result[name].float(), value.float(), rtol=near, atol=near)
    assert fair.last.pair_losses.dtype == torch.float32
    assert all(torch.isfinite(g).all() for g in gradients(result, output))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_base
def test_half_precision(kind, dtype):
    fair = parts(kind)
    output = model_output(kind, dtype=dtype)
    result = fair(**output, **metadata(), output_dict=True)
    assert result["fairness_loss"].dtype == torch.float32
    wide = {k: v.detach().float() if v.is_floating_point() else v for k, v in output.items()}
    expected = parts(kind)(**wide, **metadata(), output_dict=True)
    for name, value in expected.items():
        torch.testing.assert_close(result[name].float(), value, rtol=0.1, atol=0.1)
    for leaf, grad in zip(
        [x for x in output.values() if x.requires_grad], gradients(result, output), strict=True
    ):
        assert grad.dtype == dtype and torch.isfinite(grad).all() and grad.shape == leaf.shape


@every_score
@pytest.mark.parametrize("unit", ["pair", "batch"])
def test_forward_and_backward_read_nothing_back(score, unit):
    fair = parts(validate=False, score=score, mining_unit=unit)
    for seed in range(2):
        output = model_output(seed=seed)
        with NoReadBack():
            total(fair(**output, **metadata(seed=seed), output_dict=True)).backward()
        fair.end_epoch()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("clip", {}),
        ("clip", {"score": "official"}),
        ("siglip", {"score": "similarity", "mining_unit": "batch"}),
        ("coca", {}),
        ("distill", {"fairness_limit": 1.0, "fairness_start": 1, "weighted_fairness": True}),
    ],
)
def test_compiles_into_one_graph(kind, options):
    torch._dynamo.reset()
    eager, inner = parts(kind, **options), parts(kind, **options)
    compiled = torch.compile(inner, fullgraph=True, backend="eager")
    for seed in range(3):
        output, given_metadata = model_output(kind, seed=seed), metadata(seed=seed)
        expected = eager(**output, **given_metadata, output_dict=True)
        got = compiled(**output, **given_metadata, output_dict=True)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value)
        for a, b in zip(gradients(got, output), gradients(expected, output), strict=True):
            torch.testing.assert_close(a, b)
    assert torch.equal(inner.miner.memory.visits, eager.miner.memory.visits)
    torch.testing.assert_close(inner.fairness.queue, eager.fairness.queue, equal_nan=True)
