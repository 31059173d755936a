"""What may be passed in: dtypes, autocast, bad input; and what runs without waiting or breaks."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_read_back import NoReadBack, as_on_an_accelerator
from sinkhorn_cases import (
    BLURS,
    POWERS,
    common_points,
    low_precision_loses_only_its_own_rounding,
    random_problem,
)

from fairclip_losses.ops import sinkhorn_divergence, sinkhorn_solve


def scores(n: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 1, generator=torch.Generator().manual_seed(seed))


def groups(n: int = 16) -> torch.Tensor:
    return (torch.arange(n) % 3 == torch.arange(3)[:, None]).float()


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize(
    ("dimension", "blur", "backend"),
    [(1, 0.0, "auto"), (1, 0.1, "auto"), (3, 0.3, "dense"), (3, 0.3, "streamed")],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision(p, dimension, blur, backend, dtype):
    x = torch.randn(40, dimension, generator=torch.Generator().manual_seed(0)).to(dtype)
    low_precision_loses_only_its_own_rounding(x, groups(40), p=p, blur=blur, backend=backend)


@pytest.mark.parametrize("blur", BLURS)
def test_autocast_changes_nothing(blur):
    expected = common_points(scores(), groups(), blur=blur)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = common_points(scores(), groups(), blur=blur)
    assert all(map(torch.equal, actual, expected))


def test_inputs_are_left_as_they_are():
    x, y, a, b = random_problem()
    before = [t.clone() for t in (x, y, a, b)]
    for blur in BLURS:
        sinkhorn_divergence(x, y, a, b, blur=blur)
    assert all(torch.equal(*pair) for pair in zip(before, (x, y, a, b), strict=True))


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("blur", [0.0, 0.1])
@pytest.mark.parametrize(("points", "rows"), [(0, 4), (5, 0)])
def test_no_points_and_no_rows_cost_nothing(p, blur, points, rows):
    x = torch.ones(points, 1, requires_grad=True)
    value = sinkhorn_divergence(x, scores(), None, torch.ones(rows, 16), p=p, blur=blur)
    assert value.tolist() == [0.0] * rows
    value.sum().backward()
    assert x.grad.shape == (points, 1) and not x.grad.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blur": -0.1}, "blur must be a finite number >= 0, got -0.1"),
        ({"blur": None}, "blur must be a finite number >= 0, got None"),
        ({"blur": "x"}, "blur must be a finite number >= 0, got 'x'"),
        ({"blur": math.nan}, "blur must be a finite number >= 0, got nan"),
        ({"blur": math.inf}, "blur must be a finite number >= 0, got inf"),
        ({"blur": 1e-160}, "blur must be 0 or from 1e-100 to 1e100, got 1e-160"),
        ({"blur": 1e160}, "blur must be 0 or from 1e-100 to 1e100, got 1e.160"),
        ({"p": 3}, "p must be 1 or 2, got 3"),
        ({"p": 0.5}, "p must be 1 or 2, got 0.5"),
        ({"scaling": 1.0}, "scaling must lie strictly between 0 and 1, got 1.0"),
        ({"iterations": 0}, "iterations must be an integer of 1 or more, got 0"),
        ({"tol": 0.0}, "tol must be > 0, got 0.0"),
        ({"max_iterations": 0}, "max_iterations must be an integer of 1 or more, got 0"),
        ({"iterations": 2.0}, "iterations must be an integer of 1 or more, got 2.0"),
        ({"iterations": True}, "iterations must be an integer of 1 or more, got True"),
        ({"iterations": "5"}, "iterations must be an integer of 1 or more, got '5'"),
        ({"max_iterations": 1e3}, "max_iterations must be an integer of 1 or more, got 1000.0"),
        ({"p": True}, "p must be 1 or 2, got True"),
        ({"blur": True}, "blur must be a finite number >= 0, got True"),
        ({"tol": True}, "tol must be > 0, got True"),
        ({"debias": "no"}, "debias must be True or False, got 'no'"),
        ({"debias": None}, "debias must be True or False, got None"),
        ({"validate": "x"}, "validate must be None, True or False, got 'x'"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_divergence(scores(), scores(), **arguments)
    with pytest.raises(ValueError, match=message):
        sinkhorn_solve(scores(), scores(), **arguments)


@pytest.mark.parametrize("dimension", [1, 2])
def test_numbers_of_other_types_are_numbers(dimension):
    """NumPy's counts, and a whole power."""
    x, y = torch.split(torch.randn(20, dimension), 10)
    options = {"p": 2.0, "blur": np.float32(0.5), "iterations": np.int64(20)}
    found = sinkhorn_divergence(x, y, **options)
    assert found == sinkhorn_divergence(x, y, p=2, blur=0.5, iterations=20)


def test_exact_transport_needs_a_line():
    with pytest.raises(ValueError, match=r"blur=0 .* needs points on a line, D = 1, got D = 2"):
        sinkhorn_divergence(torch.zeros(4, 2), torch.zeros(4, 2), blur=0)


@pytest.mark.parametrize("blur", [0.0, 0.1])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["x", "y"])
def test_points_that_are_not_finite(blur, wrong, side):
    points = scores()
    points[3] = wrong
    pair = (points, scores(5)) if side == "x" else (scores(5), points)
    with pytest.raises(ValueError, match=f"{side} must be finite .* at 1 of 16 points"):
        sinkhorn_divergence(*pair, blur=blur)


@pytest.mark.parametrize(
    ("p", "dimension", "blur", "backend"),
    [
        *((p, 1, blur, "auto") for p in POWERS for blur in BLURS),
        *(
            (p, d, 0.3, backend)
            for p in POWERS
            for d in (1, 2)
            for backend in ("dense", "streamed")
        ),
        (1, 1, 0.3, "prefix"),
    ],
)
@settings(max_examples=4)
@given(
    absent=st.lists(st.integers(0, 15), min_size=1, max_size=9, unique=True),
    bad=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]),
    common=st.booleans(),
    device=st.sampled_from([nullcontext, as_on_an_accelerator]),
)
def test_absent_points_may_be_anything(p, dimension, blur, backend, absent, bad, common, device):
    """Cost and gradients are those of the points there are, and 0 at the others."""
    whole = torch.randn(16, dimension, generator=torch.Generator().manual_seed(0))
    whole[absent] = bad
    there = [k for k in range(16) if k not in absent]
    weights = groups() + 0.1
    weights[:, absent] = 0
    found = []
    for kept in (list(range(16)), there):
        points = [whole[kept].requires_grad_() for _ in range(2 - common)]
        pair = weights[0, kept], weights[:, kept]
        with device():
            value = sinkhorn_divergence(
                points[0], points[-1], *pair, p=p, blur=blur, backend=backend
            )
            value.sum().backward()
        found.append((value, torch.cat([entry.grad for entry in points])))
    (value, grad), (expected, expected_grad) = found
    torch.testing.assert_close(value, expected)
    every = [k + 16 * side for side in range(2 - common) for k in there]
    torch.testing.assert_close(grad[every], expected_grad)
    assert grad.count_nonzero() <= expected_grad.numel()


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("side", ["a", "b"])
def test_bad_weights(wrong, side):
    weights = torch.ones(2, 16)
    weights[1, 2] = wrong
    with pytest.raises(ValueError, match=f"weights {side} must be finite and >= 0, got .*1 such"):
        sinkhorn_divergence(scores(), scores(), **{side: weights})


def test_what_is_not_of_floating_point_numbers():
    whole = torch.arange(16)
    for inputs, message in (
        (([1.0], scores()), "x must be a tensor, got list"),
        ((whole[:, None], scores()), "x must be floating point, got"),
        ((scores(), scores(), None, whole), "weights b must be floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            sinkhorn_divergence(*inputs)


@pytest.mark.parametrize(
    ("x", "y", "a", "b", "message"),
    [
        ((16,), (16, 1), None, None, r"x must have shape \(\*, N, D\), got \(16,\)"),
        ((16, 1), (16,), None, None, r"y must have shape \(\*, N, D\), got \(16,\)"),
        ((16, 1), (16, 2), None, None, "share their dimension D, got 1 and 2"),
        ((16, 1), (9, 1), (9,), None, r"weights a must have shape \(\*, 16\), got \(9,\)"),
        ((16, 1), (9, 1), None, (2, 16), r"weights b must have shape \(\*, 9\), got \(2, 16\)"),
        ((16, 1), (9, 1), (), None, r"weights a must have shape \(\*, 16\), got \(\)"),
        ((2, 16, 1), (3, 9, 1), None, None, r"do not broadcast: \(2,\), \(3,\)"),
        ((16, 1), (9, 1), (2, 16), (3, 9), r"do not broadcast: \(\), \(\), \(2,\), \(3,\)"),
    ],
)
def test_bad_shapes(x, y, a, b, message):
    weights = [None if shape is None else torch.ones(shape) for shape in (a, b)]
    with pytest.raises(ValueError, match=message):
        sinkhorn_divergence(torch.zeros(x), torch.zeros(y), *weights)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize(
    ("n", "dimension", "blur", "options"),
    [
        (200, 1, 0.0, {}), (200, 1, 0.1, {}), (1100, 1, 0.1, {"iterations": 5}),
        (30, 2, 0.1, {"scaling": 0.05}), (200, 2, 0.1, {"iterations": 5}),
        (30, 20, 0.3, {"iterations": 5, "backend": "streamed"}),
    ],
)  # fmt: skip
def test_nothing_is_read_back_from_a_device(p, n, dimension, blur, options, monkeypatch):
    """On the meta device, which has shapes and no values: reading one raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # unknown to meta
    x = torch.empty(n, dimension, device="meta", requires_grad=True)
    y = torch.empty(n - 10, dimension, device="meta", requires_grad=True)
    a, b = (torch.empty(3, k, device="meta", requires_grad=True) for k in (n, n - 10))
    with NoReadBack():
        common = sinkhorn_divergence(x, x, None, a, p=p, blur=blur, **options)
        apart = sinkhorn_divergence(x, y, a, b, p=p, blur=blur, **options)
        (common + apart).sum().backward()
    assert common.shape == apart.shape == (3,)
    for entry in (x, y, a, b):
        assert entry.grad.shape == entry.shape


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("wants_weights", [False, True])
def test_compiles_without_graph_breaks(p, wants_weights):
    def step(x, weights):
        return sinkhorn_divergence(x, x, None, weights, p=p, blur=0.0).sum()

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    eager_x, x = scores().requires_grad_(), scores().requires_grad_()
    eager_b, b = (groups().requires_grad_(wants_weights) for _ in range(2))
    expected, actual = step(eager_x, eager_b), compiled(x, b)
    expected.backward()
    actual.backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(x.grad, eager_x.grad)
    if wants_weights:
        torch.testing.assert_close(b.grad, eager_b.grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own
@pytest.mark.parametrize(("p", "dimension"), [(1, 1), (2, 1), (2, 2)])
def test_a_blur_breaks_the_graph_and_nothing_else(p, dimension):
    """With ``fullgraph=False``: the solvers run as they do without the compiler."""
    x, y, a, b = random_problem(12, 9, dimension=dimension)

    def step(x):
        return 2.0 * sinkhorn_divergence(x, y, a, b, p=p, blur=0.3).sum()

    grads = []
    for way in (step, torch.compile(step, backend="eager")):
        points = x.clone().requires_grad_()
        way(points).backward()
        grads.append(points.grad)
    assert torch.equal(*grads)


def test_a_fixed_number_of_iterations_is_near_the_tolerance():
    x, y, a, b = random_problem(30, 20)
    for p in POWERS:
        free = sinkhorn_divergence(x, y, a, b, p=p, blur=0.1)
        fixed = sinkhorn_divergence(x, y, a, b, p=p, blur=0.1, iterations=12)
        torch.testing.assert_close(fixed, free, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("blur", [0.0, 0.1])
def test_common_points_are_looked_at_for_both_measures(p, blur):
    """A point that is absent from a alone is not absent."""
    x = torch.tensor([[0.0], [1.0], [float("nan")]])
    a, b = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="finite where it has weight"):
        sinkhorn_divergence(x, x, a, b, p=p, blur=blur)


@pytest.mark.parametrize("dimension", [1, 2])
@pytest.mark.parametrize("p", [1, 2])
def test_weights_whose_sum_is_no_number(p, dimension):
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 10, dimension, generator=draw, dtype=torch.float64)
    huge = torch.full((10,), 1e308, dtype=torch.float64)
    torch.testing.assert_close(
        sinkhorn_divergence(x, y, huge, p=p), sinkhorn_divergence(x, y, p=p), rtol=1e-9, atol=0.0
    )
