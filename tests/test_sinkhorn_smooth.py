"""p = 2 on a line at any size: fewer points that stand for all, windows, and the error's bound."""

from __future__ import annotations

import math
import tracemalloc
from unittest import mock

import numpy as np
import ot
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from sinkhorn_cases import float64, one_thread

from fairclip_losses.ops import ConvergenceWarning, sinkhorn_divergence, sinkhorn_solve
from fairclip_losses.ops.host.gauss.cells import Cells, divide
from fairclip_losses.ops.host.gauss.chebyshev import Places
from fairclip_losses.ops.host.gauss.quadrature import compress
from fairclip_losses.ops.host.gauss.ragged import Cloud, Ordered, Ragged
from fairclip_losses.ops.host.gauss.windows import read_windows, windows

LAYOUTS = ("normal", "uniform", "clustered", "two places", "ties", "far apart")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with one_thread():
        yield


def scores(layout: str, n: int, draw: np.random.Generator) -> np.ndarray:
    """Return n points of a spread near 1."""
    normal = 0.3 * draw.standard_normal(n)
    tail = draw.random(n) < 0.1
    found: np.ndarray = {
        "normal": lambda: normal,
        "uniform": lambda: draw.uniform(-1, 1, n),
        "clustered": lambda: np.where(tail, 0.5 + np.abs(normal), 0.01 * normal),
        "two places": lambda: np.where(draw.random(n) < 0.4, 1e-3 * normal, 1 + 1e-3 * normal),
        "ties": lambda: normal.round(1),
        "far apart": lambda: np.where(draw.random(n) < 0.5, normal - 30, normal + 30),
    }[layout]()
    return found


def problem(layout: str, n: int, groups: int, mixed: bool, seed: int):
    """Return points (n, 1) and group weights (groups, n): groups of any points, or of quantiles."""
    draw = np.random.default_rng(seed)
    x = scores(layout, n, draw)
    order = x.argsort().argsort() * groups // n
    codes = draw.integers(0, groups, n) if mixed else order
    codes[:groups] = np.arange(groups)  # none is empty
    weights = (codes == np.arange(groups)[:, None]) * draw.uniform(0.2, 1.0, n)
    return torch.from_numpy(x)[:, None], torch.from_numpy(weights)


def marginal_errors(x, b, f, g, blur) -> np.ndarray:
    """Sum up the plans of all points, a (uniform) to each row of b, entry by entry."""
    points, weights = x[:, 0].numpy(), (b / b.sum(1, keepdim=True)).numpy()
    cost = 0.5 * (points[:, None] - points) ** 2
    found = []
    for row, one, other in zip(weights, f.numpy(), g.numpy(), strict=True):
        there = row > 0
        exponent = (one[:, None] + other[there] - cost[:, there]) / blur**2
        plan = np.exp(exponent) * row[there] / len(points)
        found.append(
            np.abs(plan.sum(1) - 1 / len(points)).sum() + np.abs(plan.sum(0) - row[there]).sum()
        )
    return np.array(found)


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    n=st.integers(2, 700),
    mixed=st.booleans(),
    blur=st.floats(-3.5, 0.5).map(lambda e: 10.0**e),
    tol=st.sampled_from([1e-3, 1e-6, 1e-9]),
    seed=st.integers(0, 2**16),
)
@example(layout="normal", n=300, mixed=False, blur=0.05, tol=1e-6, seed=0)
@example(layout="far apart", n=300, mixed=False, blur=0.5, tol=1e-9, seed=0)
def test_tol_bounds_the_error_of_the_marginals(layout, n, mixed, blur, tol, seed):
    """The bound that the user sets holds on all points, whatever stood for them."""
    x, b = problem(layout, n, 2, mixed, seed)
    blur = blur * float(x.max() - x.min() + 1e-3)
    solved = sinkhorn_solve(x, x, None, b, blur=blur, tol=tol)
    error = marginal_errors(x, b, solved.f, solved.g, blur)
    rounding = 2e-15 * float((x.max() - x.min()) ** 2) / blur**2
    assert (error <= tol + rounding).all(), error
    np.testing.assert_allclose(
        solved.marginal_error.numpy(), error, rtol=1e-4, atol=rounding + 1e-13
    )
    assert (solved.converged == (solved.marginal_error <= tol)).all()


def answer(x, b, **options):
    """Return the divergences (G,) and the gradients of their sum in the points and the weights."""
    points, weights = x.clone().requires_grad_(), b.clone().requires_grad_()
    value = sinkhorn_divergence(points, points, None, weights, **options)
    value.sum().backward()
    return value.detach(), points.grad, weights.grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("blur", [1e-3, 0.01, 0.1, 1.0])
def test_values_and_gradients_are_those_of_all_costs(layout, mixed, blur):
    """Held to Newton's method in torch on all costs of all points."""
    x, b = problem(layout, 400, 3, mixed, seed=1)
    tol = 1e-11 if blur > 1e-3 else 1e-9  # above the rounding
    blur = blur * float(x.max() - x.min())
    found, exact = (
        answer(x, b, blur=blur, **options) for options in ({}, {"backend": "dense", "tol": tol})
    )
    for value, due in zip(found[:2], exact, strict=False):
        scale = float(due.abs().max())
        assert float((value - due).abs().max()) <= 1e-5 * scale + 1e-14


@pytest.mark.parametrize("layout", ["normal", "clustered", "far apart"])
def test_weights_slopes_are_those_of_all_costs(layout):
    """In the weights too, at points without weight as well; a constant drops out of them."""
    x, b = problem(layout, 300, 2, True, seed=2)
    blur = 0.02 * float(x.max() - x.min())
    found, exact = (
        answer(x, b, blur=blur, **options)[2]
        for options in ({}, {"backend": "dense", "tol": 1e-11})
    )
    assert float((found - exact).abs().max()) <= 1e-5 * float(exact.abs().max())


def test_values_are_pots():
    """Held to POT's couplings; POT's regulariser is the negative entropy of the plan."""
    x, b = problem("normal", 300, 2, False, seed=3)
    a = np.full(300, 1 / 300)
    blur = 0.08
    cost = 0.5 * (x.numpy() - x.numpy().T) ** 2

    def transport(one, other, cost):
        plan = ot.bregman.sinkhorn_log(one, other, cost, blur**2, stopThr=1e-12, numItermax=20_000)
        density = np.where(plan > 0, plan, 1.0) / np.outer(one, other)
        return (plan * (cost + blur**2 * np.log(density, where=plan > 0, out=0 * plan))).sum()

    for row, value in zip(b.numpy(), sinkhorn_divergence(x, x, None, b, blur=blur), strict=True):
        there = row > 0
        other = row[there] / row.sum()
        within = transport(a, a, cost) + transport(other, other, cost[there][:, there])
        expected = transport(a, other, cost[:, there]) - 0.5 * within
        assert value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("blur", [1e-4, 1e-2, 0.3])
def test_rows_of_points_of_their_own(blur):
    """Many rows at once, of different numbers of points: each as if it were alone."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(70, 40, 1, generator=draw, dtype=torch.float64)
    y = torch.randn(70, 25, 1, generator=draw, dtype=torch.float64)
    b = torch.rand(70, 25, generator=draw, dtype=torch.float64)
    b[b < 0.6] = 0.0
    b[:, 3] = 1.0
    together = sinkhorn_divergence(x, y, None, b, blur=blur)
    alone = [
        sinkhorn_divergence(one, other[row > 0], None, row[row > 0], blur=blur)
        for one, other, row in zip(x, y, b, strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("layout", ["normal", "clustered"])
@pytest.mark.parametrize("blur", [1e-3, 0.05])
def test_windows_and_all_entries_agree(layout, blur):
    x, b = problem(layout, 600, 2, True, seed=4)
    whole = answer(x, b, blur=blur)
    with mock.patch("fairclip_losses.ops.host.gauss.problem._DENSE", 0):
        parts = answer(x, b, blur=blur)
    for value, due in zip(parts, whole, strict=True):
        torch.testing.assert_close(value, due, rtol=1e-6, atol=1e-8 * float(due.abs().max()))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("blur", [5e-4, 0.05, 2.0])
def test_memory_of_many_points(p, blur):
    """Eight groups of a batch of 16,384, where the costs of one alone would take 256 MiB."""
    x, b = problem("normal", 16_384, 8, True, seed=5)
    points = x.clone().requires_grad_()
    sinkhorn_divergence(points[:99], points[:99], p=p, blur=blur)  # imports what there is to import
    tracemalloc.start()
    sinkhorn_divergence(points, points, None, b, p=p, blur=blur).sum().backward()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 2**20


ordered = st.lists(st.floats(-1, 1), min_size=1, max_size=60, unique=True).map(
    lambda values: np.sort(np.array(values))
)


@settings(max_examples=100, deadline=None)
@given(points=ordered, order=st.integers(1, 9), seed=st.integers(0, 99))
def test_gauss_rules_keep_all_moments(points, order, seed):
    """Of two rows in two cells each: all that polynomials below twice the order integrate to."""
    rows = np.random.default_rng(seed).uniform(0, 1, (2, points.size)) + 1e-3
    rows /= rows.sum(1, keepdims=True)
    size, half = points.size, (points.size + 1) // 2
    measures = Ragged(np.tile(points, 2), rows.reshape(-1), np.array([size, size]))
    first = np.array([0, half, size, size + half])
    last = np.array([half - 1, size - 1, size + half - 1, 2 * size - 1])
    kept = last >= first
    light = compress(measures, Cells(first[kept], last[kept]), order)
    assert light.count.sum() == light.points.size <= 4 * order
    assert (light.weights >= 0).all()
    for row in range(2):
        some = slice(light.starts[row], light.ends[row])
        for power in range(2 * order):
            np.testing.assert_allclose(
                light.weights[some] @ light.points[some] ** power,
                rows[row] @ points**power, atol=1e-13,
            )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    x=ordered, y=ordered, depth=st.floats(1, 30), blur=st.floats(0.02, 2), seed=st.integers(0, 99)
)
def test_windows_leave_out_what_is_below_their_depth(x, y, depth, blur, seed):
    """At potentials that nothing is known of, point by point."""
    draw = np.random.default_rng(seed)
    g, epsilon = draw.normal(size=y.size), blur**2
    low, high = windows(x, y, g, epsilon, depth)
    exponent = (g - 0.5 * (x[:, None] - y) ** 2) / epsilon
    outside = (np.arange(y.size) < low[:, None]) | (np.arange(y.size) > high[:, None])
    below = exponent < exponent.max(1, keepdims=True) - depth * (1 - 1e-9)
    assert (below | ~outside).all()
    assert (high >= low).all()

    weights = draw.uniform(0.1, 1, y.size)
    least, pull = read_windows(x, y, weights, g, epsilon, depth=45.0)
    logs = exponent + np.log(weights)
    np.testing.assert_allclose(least, -epsilon * logsumexp(logs, 1), rtol=1e-9, atol=1e-9)
    share = np.exp(logs - logsumexp(logs, 1, keepdims=True))
    np.testing.assert_allclose(pull, x - share @ y, rtol=1e-9, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(ordered, ordered), min_size=1, max_size=4), blur=st.floats(0.001, 2))
def test_cells_part_the_points_of_each_row(rows, blur):
    def measures(side):
        points = [row[side] for row in rows]
        weights = [np.full(p.size, 1 / p.size) for p in points]
        count = np.array([p.size for p in points])
        return Ragged(np.concatenate(points), np.concatenate(weights), count)

    own, other = measures(0), measures(1)
    cells = divide(own, other, blur**2, few=3, longest=2.0)
    assert cells.first[0] == 0 and cells.last[-1] == own.points.size - 1
    np.testing.assert_array_equal(cells.first[1:], cells.last[:-1] + 1)
    assert set(own.starts) <= set(cells.first)


@settings(max_examples=50, deadline=None)
@given(points=ordered)
def test_polynomials_are_known_from_their_places(points):
    cloud = Ragged(points, np.full(points.size, 1 / points.size), np.array([points.size]))
    places = Places.of(cloud, Cells(np.array([0]), np.array([points.size - 1])), order=6)

    def polynomial(t):
        return 1 - t + 3 * t**2 - 2 * t**5

    (found,) = places.fill([polynomial(places.where.points)])
    np.testing.assert_allclose(found, polynomial(points), atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=24, max_size=24),
)
def test_clouds_merge_ties_and_know_where_each_point_is(values, weights):
    points = np.array(values, float)
    rows = np.array(weights).reshape(2, 12)[:, : points.size]
    rows[:, 0] += 0.5
    cloud = Cloud(Ordered.of(points[None]), rows)
    for row in range(2):
        some = slice(cloud.present.starts[row], cloud.present.ends[row])
        distinct, inverse = np.unique(points[rows[row] > 0], return_inverse=True)
        np.testing.assert_array_equal(cloud.present.points[some], distinct)
        summed = np.bincount(inverse, rows[row][rows[row] > 0])
        np.testing.assert_allclose(cloud.present.weights[some], summed)
    back = cloud.spread(cloud.present.points, cloud.absent.points)
    np.testing.assert_array_equal(back, np.broadcast_to(points, (2, points.size)))
    np.testing.assert_array_equal(cloud.take(back), cloud.present.points)


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    n=st.integers(2, 200),
    exponent=st.floats(-12, -5),
    seed=st.integers(0, 99),
)
def test_a_vanishing_blur_is_met_and_costs_what_transport_does(layout, n, exponent, seed):
    """Costs are then 1e24 epsilon: nothing of them may be lost in a rounding, and none warns."""
    x, b = problem(layout, n, 2, True, seed)
    x = x.unique()[:, None]
    b = b[:, : len(x)] + 0.01
    blur = 10.0**exponent * float(x.max() - x.min() + 1e-3)
    value, slope, _ = answer(x, b, blur=blur)
    exact, slope_of_exact, _ = answer(x, b, blur=0)
    # each coupling of n + m - 1 pairs costs its entropy besides
    torch.testing.assert_close(value, exact, rtol=1e-9, atol=20 * blur**2)
    assert torch.isfinite(slope).all() and torch.isfinite(slope_of_exact).all()


@pytest.mark.parametrize("blur", [0.1, 1.0])
@pytest.mark.parametrize("deviations", [(1.0, 1.0), (1.0, 0.5), (0.4, 1.5)])
def test_tails_of_next_to_no_mass(blur, deviations):
    """Normal densities on a grid, with weights down to 1e-300: Janati et al. 2020, theorem 1."""
    grid = torch.linspace(-12, 12, 500, dtype=torch.float64)[:, None]
    a, b = (
        torch.exp(-0.5 * ((grid[:, 0] - mean) / deviation) ** 2)
        for mean, deviation in zip((0.0, 1.0), deviations, strict=True)
    )

    def entropic(s, t):  # of the centred ones, up to what debiasing cancels
        d = math.sqrt(4 * s**2 * t**2 + blur**4)
        return 0.5 * (s**2 + t**2 - d + blur**2 * math.log(d + blur**2))

    s, t = deviations
    expected = 0.5 + entropic(s, t) - 0.5 * entropic(s, s) - 0.5 * entropic(t, t)
    for backend in ("auto", "dense"):
        solved = sinkhorn_solve(grid, grid.clone(), a, b, blur=blur, backend=backend)
        assert solved.converged
        assert solved.cost.item() == pytest.approx(expected, rel=1e-5)


def test_a_light_point_far_away_pulls_as_on_all_costs():
    """Beyond the outermost of the points that stand for others its potential would be foretold."""
    x = torch.linspace(0, 1, 400, dtype=torch.float64)[:, None]
    y = torch.cat([float64([[-96.0]]), torch.linspace(0.1, 0.9, 200, dtype=torch.float64)[:, None]])
    b = torch.ones(201, dtype=torch.float64)
    b[0] = 1e-12

    def slope(**options):
        points = x.clone().requires_grad_()
        sinkhorn_divergence(points, y, None, b, blur=0.01, **options).backward()
        return points.grad

    torch.testing.assert_close(slope(), slope(backend="dense", tol=1e-11), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("wider", [1e6, 1e14, 1e16])
def test_rows_of_other_scales_are_their_own(wider):
    """Points of a row are parted as if it were alone, also where another's are far wider."""
    x = torch.linspace(-1, 1, 600, dtype=torch.float64)[:, None].expand(2, 600, 1).clone()
    x[0] *= wider
    y = 0.7 * x + 0.1
    together = sinkhorn_divergence(x, y, blur=0.2)
    assert together.isfinite().all()
    # about the common mean the narrow row loses the digits that the wide one takes
    close = 1e-9 + 1e-15 * wider
    if close < 1e-3:
        alone = sinkhorn_divergence(x[1], y[1], blur=0.2)
        torch.testing.assert_close(together[1], alone, rtol=close, atol=0.0)


@pytest.mark.parametrize("p", [1, 2])
def test_a_self_term_that_did_not_converge_is_told(p):
    x, b = problem("normal", 200, 2, True, seed=6)
    with pytest.warns(ConvergenceWarning, match="stopped after 1 rounds"):
        solved = sinkhorn_solve(x, x, None, b, p=p, blur=0.3, max_iterations=1)
    assert not solved.converged.any()
