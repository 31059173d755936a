"""SinkhornFairnessLoss and its function against loops over SciPy's and POT's distances."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import ot
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from loss_cases import NUM_GROUPS, group_codes
from scipy.stats import wasserstein_distance

from fairclip_losses import SinkhornFairnessLoss
from fairclip_losses.functional import FairnessTerms, sinkhorn_fairness

# ------------------------------ the reference: one distance after the other


def exact_distance(whole, group, p):
    if p == 1:
        return wasserstein_distance(whole, group)
    cost = ot.emd2_1d(np.asarray(whole), np.asarray(group), metric="sqeuclidean")
    return cost / 2


def entropic_distance(whole, group, p, blur):
    """Debiased, from POT's couplings: their cost and their divergence from the product."""
    epsilon = blur**p

    def entropic(x, y):
        a, b = np.full(len(x), 1 / len(x)), np.full(len(y), 1 / len(y))
        cost = np.abs(np.subtract.outer(x, y)) ** p / p
        plan = ot.sinkhorn(
            a, b, cost, epsilon, method="sinkhorn_log", numItermax=20000, stopThr=1e-12, warn=False
        )
        product = np.outer(a, b)
        seen = plan > 0
        kl = (plan[seen] * np.log(plan[seen] / product[seen])).sum()
        return (plan * cost).sum() + epsilon * kl

    whole, group = np.asarray(whole), np.asarray(group)
    return entropic(whole, group) - entropic(whole, whole) / 2 - entropic(group, group) / 2


def loop_fairness(
    whole,
    groups,
    num_groups,
    *,
    p=1,
    blur=0.0,
    attribute_weights=None,
    group_reduction="mean",
    min_group_size=2,
    divide_by_group_sum=False,
):
    """The term from lists: `whole` all scores, `groups[c][g]` those of each group."""
    total, per_group = 0.0, []
    for c, count in enumerate(num_groups):
        distances = []
        for g in range(count):
            scores = groups[c][g]
            if len(scores) < min_group_size:
                per_group.append(0.0)
                continue
            if divide_by_group_sum:
                scores = [s / sum(scores) for s in scores]
            if blur == 0:
                distances.append(exact_distance(whole, scores, p))
            else:
                distances.append(entropic_distance(whole, scores, p, blur))
            per_group.append(distances[-1])
        weight = 1 / len(num_groups) if attribute_weights is None else attribute_weights[c]
        value = sum(distances)
        if group_reduction == "mean" and distances:
            value /= len(distances)
        total += weight * value
    return total, per_group


def split(scores, codes, num_groups, valid=None):
    """Lists of the scores of all and of each group, as the loop takes them."""
    keep = [True] * len(scores) if valid is None else list(valid)
    whole = [s for s, k in zip(scores, keep, strict=True) if k]
    groups = [
        [
            [s for s, code, k in zip(scores, codes[:, c], keep, strict=True) if k and code == g]
            for g in range(count)
        ]
        for c, count in enumerate(num_groups)
    ]
    return whole, groups


@st.composite
def batches(draw, most=14, attributes=3):
    """Scores (B,), codes (B, C) with unknowns, and the number of groups of each attribute."""
    count = draw(st.integers(1, most))
    num_groups = draw(st.lists(st.integers(1, 4), min_size=1, max_size=attributes))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    scores = generator.normal(size=count) * draw(st.sampled_from([0.01, 1.0, 50.0]))
    if draw(st.booleans()):
        scores = np.round(scores, 1)  # ties
    codes = np.stack([generator.integers(-1, g, count) for g in num_groups], axis=1)
    return scores, codes, tuple(num_groups)


def tensors(scores, codes, dtype=torch.float64, grad=False):
    return torch.tensor(scores, dtype=dtype, requires_grad=grad), torch.tensor(codes)


def random_batch(count=20, num_groups=NUM_GROUPS, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    return scores, group_codes(count, num_groups, draw)


# ------------------------------ values


@settings(max_examples=120)
@given(
    batch=batches(),
    p=st.sampled_from([1, 2]),
    reduction=st.sampled_from(["mean", "sum"]),
    least=st.integers(1, 3),
    weights=st.none() | st.lists(st.floats(0, 5), min_size=3, max_size=3),
    divided=st.booleans(),
    seed=st.none() | st.integers(0, 2**31),
)
def test_equals_the_loop_over_groups(batch, p, reduction, least, weights, divided, seed):
    scores, codes, num_groups = batch
    valid = np.ones(len(scores), bool)
    if seed is not None:
        valid = np.random.default_rng(seed).random(len(scores)) < 0.7
    if divided:
        scores = np.abs(scores) + 0.1  # sums away from 0
    options = {
        "p": p,
        "group_reduction": reduction,
        "min_group_size": least,
        "attribute_weights": weights and weights[: len(num_groups)],
        "divide_by_group_sum": divided,
    }
    whole, groups = split(scores, codes, num_groups, valid)
    expected, per_group = loop_fairness(whole, groups, num_groups, **options)
    points, codes = tensors(np.where(valid, scores, np.nan), codes, grad=True)
    given = None if seed is None else torch.tensor(valid)
    terms = sinkhorn_fairness(points, codes, num_groups, valid=given, **options)
    assert isinstance(terms, FairnessTerms) and terms.total.dtype == torch.float64
    atol = 1e-11 * (1 + np.abs(scores).max() ** p)
    np.testing.assert_allclose(terms.total.detach(), expected, rtol=1e-9, atol=atol)
    np.testing.assert_allclose(terms.per_group.detach(), per_group, rtol=1e-9, atol=atol)
    assert terms.counts.tolist() == [len(group) for attribute in groups for group in attribute]
    terms.total.backward()
    assert torch.isfinite(points.grad).all() and (points.grad[~torch.tensor(valid)] == 0).all()


@settings(max_examples=6)
@given(batch=batches(most=6, attributes=1), p=st.sampled_from([1, 2]))
def test_blurred_term_equals_pots_couplings(batch, p):
    scores, codes, num_groups = batch
    scores = scores / (1 + np.abs(scores).max())
    expected, _ = loop_fairness(*split(scores, codes, num_groups), num_groups, p=p, blur=0.3)
    terms = sinkhorn_fairness(*tensors(scores, codes), num_groups, p=p, blur=0.3)
    np.testing.assert_allclose(terms.total, expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=40)
@given(batch=batches(), seed=st.integers(0, 2**31), shift=st.floats(-5, 5))
def test_order_and_shift_change_nothing(batch, seed, shift):
    scores, codes, num_groups = batch
    order = np.random.default_rng(seed).permutation(len(scores))
    one = sinkhorn_fairness(*tensors(scores, codes), num_groups).total
    other = sinkhorn_fairness(*tensors(scores[order] + shift, codes[order]), num_groups).total
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


def test_a_group_that_is_the_batch_costs_nothing():
    scores, _ = random_batch()
    whole = torch.zeros(20, dtype=torch.int64)
    assert float(SinkhornFairnessLoss()(scores.detach(), whole)) == 0.0


# ------------------------------ gradients


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(2, 9),
    p=st.sampled_from([1, 2]),
    reduction=st.sampled_from(["mean", "sum"]),
    divided=st.booleans(),
)
def test_gradcheck(seed, count, p, reduction, divided):
    scores, codes = random_batch(count, (3, 2), seed)
    # Distinct points: on the line the distance has corners where points of two groups meet.
    assume(not (divided and p == 1))  # scaled points may meet
    ranks = scores.detach().argsort().argsort()
    points = (0.5 + ranks + 0.3 * scores.detach().sigmoid()).requires_grad_()

    def term(points):
        return sinkhorn_fairness(
            points, codes, (3, 2), p=p, group_reduction=reduction, divide_by_group_sum=divided
        ).total

    assert torch.autograd.gradcheck(term, (points,), eps=1e-6, atol=1e-5)


@settings(max_examples=40)
@given(batch=batches(), p=st.sampled_from([1, 2]), divided=st.booleans())
def test_detach_parts_the_gradient(batch, p, divided):
    # W_1 of common points has corners, where the two sides may choose differently.
    assume(divided or p == 2)
    scores, codes, num_groups = batch
    scores = np.unique(np.abs(scores) + 0.1)  # distinct, sums away from 0
    codes = codes[: len(scores)]
    grads = {}
    for side in ("none", "groups", "total"):
        points, groups = tensors(scores, codes, grad=True)
        term = sinkhorn_fairness(
            points, groups, num_groups, p=p, detach=side, divide_by_group_sum=divided
        )
        (grads[side],) = torch.autograd.grad(term.total, points)
    torch.testing.assert_close(grads["none"], grads["groups"] + grads["total"])


def test_detach_groups_sends_nothing_through_the_groups_sum():
    # Batch {1, 2, 3, 4}, group {1, 3} -> {1/4, 3/4}: the batch's half-units meet 1/4, 1/4, 3/4, 3/4
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    codes = torch.tensor([0, -1, 0, -1])
    options = {"p": 2, "divide_by_group_sum": True, "detach": "groups"}
    sinkhorn_fairness(scores, codes, (1,), **options).total.backward()
    moved = scores.detach() - torch.tensor([0.25, 0.25, 0.75, 0.75], dtype=torch.float64)
    torch.testing.assert_close(scores.grad, moved / 4)


# ------------------------------ empty is normal


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("blur", [0.0, 0.1])
@pytest.mark.parametrize(
    "codes",
    [
        [-1, -1, -1],  # all unknown
        [0, 1, 2],  # groups of one
        [2, -1, -1],  # absent groups beside a group of one
        [],  # an empty batch
    ],
)
@pytest.mark.parametrize("options", [{}, {"group_reduction": "sum", "detach": "groups"}])
def test_nothing_to_compare_is_a_graph_connected_zero(p, blur, codes, options):
    loss = SinkhornFairnessLoss(p=p, blur=blur, num_groups=3, queue_size=2, **options)
    scores = torch.linspace(-1, 1, len(codes)).requires_grad_()
    term = loss(scores, torch.tensor(codes, dtype=torch.int64), record=False)
    assert term.shape == () and float(term.detach()) == 0.0
    term.backward()
    assert torch.equal(scores.grad, torch.zeros(len(codes)))
    assert loss.last is not None and loss.last.per_group.shape == (3,)
    # Nor of what is not valid, whatever it is.
    scores = torch.full((4,), math.nan, requires_grad=True)
    invalid = torch.zeros(4, dtype=torch.bool)
    term = loss(scores, torch.arange(4) % 2, valid=invalid, record=False)
    term.backward()
    assert float(term.detach()) == 0.0 and torch.equal(scores.grad, torch.zeros(4))


# ------------------------------ the module


@settings(max_examples=30)
@given(
    batch=batches(),
    p=st.sampled_from([1, 2]),
    reduction=st.sampled_from(["mean", "sum"]),
    side=st.sampled_from(["none", "groups", "total"]),
    inferred=st.booleans(),
)
def test_function_and_module_are_equal(batch, p, reduction, side, inferred):
    scores, codes, num_groups = batch
    options = {"p": p, "group_reduction": reduction, "detach": side}
    points, groups = tensors(scores, codes, grad=True)
    terms = sinkhorn_fairness(points, groups, num_groups, **options)
    module = SinkhornFairnessLoss(num_groups=None if inferred else num_groups, **options)
    got = module(points, groups)
    (a,) = torch.autograd.grad(terms.total, points)
    (b,) = torch.autograd.grad(got, points)
    assert module.last is not None and torch.equal(module.last.total, got.detach())
    if inferred:  # without the rows of absent groups, sums over rows round elsewhere
        torch.testing.assert_close(got, terms.total, rtol=1e-11, atol=1e-15)
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-15)
    else:
        assert torch.equal(got, terms.total) and torch.equal(a, b)
        for mine, theirs in zip(module.last, terms, strict=True):
            assert torch.equal(mine, theirs.detach())


def test_forms_of_the_groups():
    scores, codes = random_batch()
    one = SinkhornFairnessLoss(num_groups=3)
    expected = one(scores, codes[:, 0])
    for form in (codes[:, :1], {"sex": codes[:, 0]}, codes[:, 0].to(torch.int8)):
        assert torch.equal(one(scores, form), expected)
    two = SinkhornFairnessLoss(num_groups={"race": 3, "sex": 2}, attribute_weights=(0.9, 0.1))
    expected = two(scores, codes)
    race, sex = codes.unbind(1)
    assert torch.equal(two(scores, {"race": race, "sex": sex}), expected)
    assert torch.equal(two(scores, {"sex": sex, "race": race}), expected)
    assert torch.equal(two(scores, {"sex": sex.int(), "race": race}), expected)


def test_attribute_weights_by_name():
    scores, codes = random_batch()
    groups = {"race": codes[:, 0], "sex": codes[:, 1]}
    weights = {"sex": 0.25, "race": 2.0}
    expected = SinkhornFairnessLoss(num_groups=(3, 2), attribute_weights=(2.0, 0.25))(scores, codes)
    for num_groups in ({"race": 3, "sex": 2}, (3, 2), None):  # names of the batch in the latter
        named = SinkhornFairnessLoss(num_groups=num_groups, attribute_weights=weights)
        assert torch.equal(named(scores, groups), expected)


def test_numpy_integers_and_repr():
    loss = SinkhornFairnessLoss(num_groups={"a": np.int64(3)})
    assert loss.num_groups == (3,) and type(loss.num_groups[0]) is int
    assert SinkhornFairnessLoss(num_groups=np.int64(2)).num_groups == (2,)
    shown = repr(SinkhornFairnessLoss(p=1, num_groups=(3, 2), queue_size=4))
    assert shown == "SinkhornFairnessLoss(p=1, blur=0.0, num_groups=(3, 2), queue_size=4)"


# ------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 3}, "p must be 1 or 2, got 3"),
        ({"blur": math.nan}, "blur must be a finite number >= 0, got nan"),
        ({"group_reduction": "max"}, "group_reduction must be one of mean, sum, got 'max'"),
        ({"detach": "both"}, "detach must be one of none, groups, total, got 'both'"),
        ({"blur": None}, "blur must be a finite number >= 0, got None"),
        ({"min_group_size": 0}, "min_group_size must be an integer of 1 or more, got 0"),
        ({"min_group_size": 1.5}, "min_group_size must be an integer of 1 or more, got 1.5"),
        ({"queue_size": 4}, "a queue needs num_groups, got queue_size=4 and num_groups=None"),
        ({"queue_size": -1}, "queue_size must be an integer of 0 or more, got -1"),
        ({"queue_size": 1.5, "num_groups": 2}, "queue_size must be an integer .*, got 1.5"),
        ({"queue_size": "a", "num_groups": 2}, "queue_size must be an integer .*, got 'a'"),
        ({"queue_size": True, "num_groups": 2}, "queue_size must be an integer .*, got True"),
        ({"num_groups": 0}, "num_groups must be integers >= 1, got 0"),
        ({"num_groups": ()}, r"num_groups must be integers >= 1, got \(\)"),
        ({"num_groups": {}}, "num_groups must be integers >= 1, got {}"),
        ({"num_groups": 2.0}, "num_groups must be integers >= 1, got 2.0"),
        ({"num_groups": (2, True)}, "num_groups must be integers >= 1"),
        ({"num_groups": {"a": 2, "b": -1}}, "num_groups must be integers >= 1"),
        ({"num_groups": (2, 2), "attribute_weights": [1.0]}, "has 1 entries for 2 attributes"),
        ({"num_groups": 2, "attribute_weights": [-1.0]}, "must be finite and >= 0"),
        ({"num_groups": 2, "attribute_weights": [math.nan]}, "must be finite and >= 0"),
        ({"num_groups": 2, "attribute_weights": ["a"]}, "must be finite and >= 0"),
        ({"num_groups": 2, "attribute_weights": 1.0}, "must be a sequence or .*, got float"),
        ({"num_groups": {"a": 2}, "attribute_weights": {"b": 1.0}}, r"\['b'\], .* are \['a'\]"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SinkhornFairnessLoss(**options)


SCORES = torch.zeros(4)
CODES = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("scores", "groups", "message"),
    [
        ([0.0] * 4, CODES, "scores must be a tensor, got list"),
        (SCORES[:, None], CODES, r"scores must be floating point of shape \(B,\), .*\(4, 1\)"),
        (SCORES.long(), CODES, r"scores must be floating point of shape \(B,\), got torch.int64"),
        (SCORES, CODES[:3], "one row a score: 4 scores, 3 rows"),
        (SCORES, CODES.float(), "group codes must be integers, got torch.float32"),
        (SCORES, CODES.bool(), "group codes must be integers, got torch.bool"),
        (SCORES, [0, 0, 0, 0], "group codes must be a tensor, got list"),
        (SCORES, {"a": CODES, "b": CODES.bool()}, "group codes must be integers, got torch.bool"),
        (SCORES, {"a": CODES, "b": CODES[:3]}, "every attribute must have one shape"),
        (SCORES, {"a": CODES[:, None]}, "every attribute must have one shape"),
        (SCORES, {}, "groups must name at least one attribute, got an empty mapping"),
        (SCORES, CODES[:, None, None], r"shape \(B,\) or \(B, C\), C >= 1, got \(4, 1, 1\)"),
        (SCORES, CODES[:, None][:, :0], r"shape \(B,\) or \(B, C\), C >= 1, got \(4, 0\)"),
    ],
)
@pytest.mark.parametrize("num_groups", [None, 2])
def test_bad_input(scores, groups, message, num_groups):
    if num_groups and isinstance(groups, dict) and len(groups) == 2:
        num_groups = (2, 2)
    with pytest.raises(ValueError, match=message):
        SinkhornFairnessLoss(num_groups=num_groups)(scores, groups)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("code", [0, -1])
def test_scores_that_are_not_finite_are_refused(bad, code):
    scores = torch.tensor([0.0, bad, 1.0, bad])
    groups = torch.tensor([0, code, 0, code])
    loss = SinkhornFairnessLoss(num_groups=1, queue_size=2)
    with pytest.raises(ValueError, match="scores must be finite, got NaN or infinity at 2 of 4"):
        loss(scores, groups)
    with pytest.raises(ValueError, match="scores must be finite"):
        sinkhorn_fairness(scores, groups, (1,))
    assert torch.isnan(loss.queue).all()  # nothing recorded


@pytest.mark.parametrize(
    ("num_groups", "codes", "message"),
    [
        (2, [0, 2], r"attribute 0: .* in -1\.\.1 \(2 groups; .*\), got 2 at position 1"),
        (2, [-2, 0], r"attribute 0: .* in -1\.\.1 \(2 groups; .*\), got -2 at position 0"),
        (1, [0, 1], r"attribute 0: .* in -1\.\.0 \(1 group; .*\), got 1 at position 1"),
        ((1, 3), [[0, 2], [-1, 3]], r"attribute 1: .* \(3 groups; .*\), got 3 at position 1"),
        (
            {"race": 3, "sex": 2},
            {"sex": [0, 2], "race": [2, 0]},
            r"attribute 'sex': .* in -1\.\.1 \(2 groups; .*\), got 2 at position 1",
        ),
        (None, [0, -2], r"attribute 0: .* -1 \(unknown\) or more, got -2 at position 1"),
        (None, {"a": [0, 0], "b": [-3, 0]}, "attribute 'b': .* or more, got -3 at position 0"),
        ((2, 2), [0, 0], "expected codes of 2 attributes, got 1"),
        ({"a": 2}, {"b": [0, 0]}, r"groups must name the attributes \['a'\], got \['b'\]"),
        ({"a": 2}, {"a": [0, 0], "b": [0, 0]}, r"groups must name the attributes \['a'\]"),
    ],
)
def test_codes_that_do_not_fit(num_groups, codes, message):
    if isinstance(codes, dict):
        codes = {name: torch.tensor(c) for name, c in codes.items()}
    else:
        codes = torch.tensor(codes)
    with pytest.raises(ValueError, match=message):
        SinkhornFairnessLoss(num_groups=num_groups)(torch.zeros(2), codes)


def test_weights_that_do_not_fit_the_batch():
    scores, codes = random_batch()
    with pytest.raises(ValueError, match="attribute_weights has 1 entries for 2 attributes"):
        SinkhornFairnessLoss(attribute_weights=[1.0])(scores, codes)
    by_name = SinkhornFairnessLoss(attribute_weights={"race": 1.0})
    with pytest.raises(ValueError, match=r"attribute_weights names \['race'\], the groups are"):
        by_name(scores, {"sex": codes[:, 0]})
    with pytest.raises(ValueError, match=r"names \['race'\], the groups are \[\]"):
        by_name(scores, codes[:, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid": torch.ones(3, dtype=torch.bool)}, r"valid must be bool of shape \(4,\)"),
        ({"valid": torch.ones(4)}, r"valid must be bool of shape \(4,\), got torch.float32"),
        ({"queue": torch.zeros(2, 5)}, r"queue must have shape \(3, K\), got \(2, 5\)"),
        ({"attribute_weights": (1.0, 1.0)}, "attribute_weights must have 1 entries, got 2"),
        ({"num_groups": (2, 2)}, r"groups of 1 attributes, got \(2, 2\)"),
        ({"num_groups": (0,)}, r"num_groups must be integers >= 1, got \(0,\)"),
        ({"p": 3}, "p must be 1 or 2, got 3"),
    ],
)
def test_bad_arguments_of_the_function(options, message):
    options = {"num_groups": (2,)} | options
    with pytest.raises(ValueError, match=message):
        sinkhorn_fairness(SCORES, CODES, **options)


# ------------------------------ the queue


class LoopQueue:
    """The remembered scores as deques, and the term over what they and a batch hold together."""

    def __init__(self, num_groups, size):
        self.num_groups = num_groups
        self.whole = deque(maxlen=size)
        self.groups = [[deque(maxlen=size) for _ in range(n)] for n in num_groups]

    def term(self, scores, codes, valid=None, **options):
        whole, groups = split(scores, codes, self.num_groups, valid)
        joined = [
            [[*new, *old] for new, old in zip(g, q, strict=True)]
            for g, q in zip(groups, self.groups, strict=True)
        ]
        return loop_fairness([*whole, *self.whole], joined, self.num_groups, **options)

    def record(self, scores, codes, valid=None):
        whole, groups = split(scores, codes, self.num_groups, valid)
        self.whole.extend(whole)
        for new, old in zip(groups, self.groups, strict=True):
            for scores_of_group, queue in zip(new, old, strict=True):
                queue.extend(scores_of_group)


@settings(max_examples=25)
@given(
    size=st.integers(1, 9),
    counts=st.lists(st.integers(0, 12), min_size=2, max_size=5),
    seed=st.integers(0, 2**31),
    p=st.sampled_from([1, 2]),
    masked=st.booleans(),
)
def test_queue_equals_concatenation_by_hand(size, counts, seed, p, masked):
    num_groups = (3, 2)
    draw = np.random.default_rng(seed)
    loss = SinkhornFairnessLoss(p=p, num_groups=num_groups, queue_size=size)
    loop = LoopQueue(num_groups, size)
    for count in counts:
        # float32 numbers, since the queue holds such
        scores = draw.normal(size=count).astype(np.float32).astype(np.float64)
        codes = np.stack([draw.integers(-1, g, count) for g in num_groups], 1)
        valid = draw.random(count) < 0.7 if masked else None
        points, groups = tensors(scores, codes, grad=True)
        got = loss(points, groups, valid=None if valid is None else torch.tensor(valid))
        expected, per_group = loop.term(scores, codes, valid, p=p)
        np.testing.assert_allclose(got.detach(), expected, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(loss.last.per_group, per_group, rtol=1e-8, atol=1e-10)
        got.backward()
        loop.record(scores, codes, valid)
        held = [loop.whole, *(queue for attribute in loop.groups for queue in attribute)]
        for row, queue in zip(loss.queue, held, strict=True):
            assert sorted(row[~row.isnan()].tolist()) == sorted(queue)


def test_queue_gradient_reaches_the_batch_alone():
    loss = SinkhornFairnessLoss(p=2, num_groups=1, queue_size=8)
    scores, _ = random_batch(6)
    loss(scores, torch.zeros(6, dtype=torch.int64))
    assert not loss.queue.requires_grad
    old = loss.queue.clone()
    new = torch.randn(3, dtype=torch.float64, requires_grad=True)
    codes = torch.tensor([0, -1, 0])

    def term(points):
        return sinkhorn_fairness(points, codes, (1,), p=2, queue=old).total

    assert torch.autograd.gradcheck(term, (new,), eps=1e-6, atol=1e-5)
    assert torch.equal(loss(new, codes), term(new))


@pytest.mark.parametrize("masked", [True, False])
def test_queue_takes_finite_scores_alone(masked):
    loss = SinkhornFairnessLoss(num_groups=1, queue_size=6, validate=False)
    scores = torch.tensor([1.0, math.nan, 2.0, math.inf, -math.inf, 1e300], dtype=torch.float64)
    codes = torch.zeros(6, dtype=torch.int64)
    loss(scores, codes, valid=torch.isfinite(scores) if masked else None)
    for row in loss.queue:
        assert row[~row.isnan()].tolist() == [1.0, 2.0]  # 1e300 is infinite in float32
    assert loss.queue_next.tolist() == [2, 2]


def test_without_a_queue_any_state_fits_any_groups():
    SinkhornFairnessLoss(num_groups=3).load_state_dict(SinkhornFairnessLoss().state_dict())


# ------------------------------ precision, devices, compilation


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("blur", [0.0, 0.1])
def test_half_precision_is_computed_in_float32(dtype, blur):
    scores, codes = random_batch(dtype=dtype)
    wide = scores.detach().float().requires_grad_()
    options = {"num_groups": (3, 2), "queue_size": 4, "blur": blur}
    narrow, other = SinkhornFairnessLoss(**options), SinkhornFairnessLoss(**options)
    for _ in range(2):  # the second with a queue
        got, expected = narrow(scores, codes), other(wide, codes)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected)
    got.backward()
    expected.backward()
    assert scores.grad.dtype == dtype
    torch.testing.assert_close(scores.grad.float(), wide.grad, rtol=0.01, atol=1e-3)


def test_no_gradient_is_needed():
    scores, codes = random_batch()
    loss = SinkhornFairnessLoss(num_groups=(3, 2), queue_size=4)
    with torch.inference_mode():
        got = loss(scores, codes, record=False)
    assert not got.requires_grad and float(got) == float(loss(scores, codes).detach())


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("queue_size", [0, 4])
def test_compiles_into_one_graph(p, queue_size):
    torch._dynamo.reset()
    options = {"p": p, "num_groups": {"race": 3, "sex": 2}, "queue_size": queue_size}
    eager, inner = SinkhornFairnessLoss(**options), SinkhornFairnessLoss(**options)
    compiled = torch.compile(inner, fullgraph=True, backend="eager")
    for seed in range(3):
        scores, codes = random_batch(seed=seed)
        groups = {"sex": codes[:, 1], "race": codes[:, 0]}
        expected, got = eager(scores, groups), compiled(scores, groups)
        torch.testing.assert_close(got, expected)
        (a,) = torch.autograd.grad(expected, scores)
        (b,) = torch.autograd.grad(got, scores)
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(inner.queue, eager.queue, equal_nan=True)
    torch.testing.assert_close(inner.last.per_group, eager.last.per_group)
