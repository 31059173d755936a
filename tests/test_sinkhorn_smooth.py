"""p = 2 on a line at any size: fewer points that stand for all, windows, and the error's bound."""

from __future__ import annotations

import tracemalloc
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from sinkhorn_cases import common_points, float64, gaussian_divergence, gaussian_weights

from fairclip_losses.ops import ConvergenceWarning, sinkhorn_divergence, sinkhorn_solve
from fairclip_losses.ops.gauss_cells import gauss_points
from fairclip_losses.ops.gauss_line import read, windows

LAYOUTS = ("normal", "uniform", "clustered", "two places", "ties", "far apart")


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
    exponent = (f.numpy()[:, :, None] + g.numpy()[:, None] - cost) / blur**2
    mass = weights[:, None] / len(points)
    plan = np.exp(np.where(mass > 0, exponent, 0.0)) * mass
    error = np.abs(plan.sum(2) - 1 / len(points)).sum(1)
    return error + np.abs(plan.sum(1) - weights).sum(1)


@settings(max_examples=60)
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("blur", [1e-3, 0.01, 0.1, 1.0])
def test_values_and_gradients_are_those_of_all_costs(layout, mixed, blur):
    """Held to Newton's method in torch on all costs of all points.

    In the weights too, at points without weight as well, where clusters are not nearly apart.
    """
    x, b = problem(layout, 400, 3, mixed, seed=1)
    tol = 1e-11 if blur > 1e-3 else 1e-9  # above the rounding
    blur = blur * float(x.max() - x.min())
    found = common_points(x, b, blur=blur)
    exact = common_points(x, b, blur=blur, backend="dense", tol=tol)
    parts = 2 if layout == "two places" or blur < 0.01 * float(x.max() - x.min()) else 3
    for value, due in zip(found[:parts], exact, strict=False):
        scale = float(due.abs().max())
        assert float((value - due).abs().max()) <= 1e-5 * scale + 1e-14


@pytest.mark.parametrize("layout", ["normal", "clustered"])
@pytest.mark.parametrize("blur", [1e-3, 0.05])
def test_windows_and_all_entries_agree(layout, blur):
    x, b = problem(layout, 600, 2, True, seed=4)
    whole = common_points(x, b, blur=blur)
    with mock.patch("fairclip_losses.ops.gauss_line.MAX_DENSE_COSTS", 0):
        parts = common_points(x, b, blur=blur)
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


@settings(max_examples=100)
@given(points=ordered, order=st.integers(1, 9), seed=st.integers(0, 99))
def test_gauss_points_keep_all_moments(points, order, seed):
    """Of two cells: all that polynomials below twice the order integrate to."""
    weights = np.random.default_rng(seed).uniform(0, 1, points.size) + 1e-3
    weights /= weights.sum()
    edges = np.unique([0, (points.size + 1) // 2, points.size])
    nodes, masses, starts = gauss_points(points, weights, edges, order)
    assert nodes.size == masses.size <= 2 * order
    assert starts.size == edges.size - 1 and (masses > 0).all()
    for power in range(2 * order):
        moment = weights @ points**power
        np.testing.assert_allclose(masses @ nodes**power, moment, atol=1e-13)


@settings(max_examples=100)
@given(
    x=ordered, y=ordered, depth=st.floats(1, 30), blur=st.floats(0.02, 2), seed=st.integers(0, 99)
)
def test_windows_leave_out_what_is_below_their_depth(x, y, depth, blur, seed):
    """At potentials that nothing is known of, point by point; c-transforms read through them."""
    draw = np.random.default_rng(seed)
    g, epsilon = draw.normal(size=y.size), blur**2
    low, high = windows(x, y, g, epsilon, depth)
    exponent = (g - 0.5 * (x[:, None] - y) ** 2) / epsilon
    outside = (np.arange(y.size) < low[:, None]) | (np.arange(y.size) > high[:, None])
    below = exponent < exponent.max(1, keepdims=True) - depth * (1 - 1e-9)
    assert (below | ~outside).all()
    assert (high >= low).all()

    weights = 10.0 ** draw.uniform(-300, 0, y.size)
    c_transform, gradient = read(x, y, weights, g, epsilon)
    logs = exponent + np.log(weights)
    np.testing.assert_allclose(c_transform, -epsilon * logsumexp(logs, 1), rtol=1e-9, atol=1e-9)
    share = np.exp(logs - logsumexp(logs, 1, keepdims=True))
    np.testing.assert_allclose(gradient, x - share @ y, rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
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
    value, slope, _ = common_points(x, b, blur=blur)
    exact, slope_of_exact, _ = common_points(x, b, blur=0)
    # each coupling of n + m - 1 pairs costs its entropy besides
    torch.testing.assert_close(value, exact, rtol=1e-9, atol=20 * blur**2)
    assert torch.isfinite(slope).all() and torch.isfinite(slope_of_exact).all()


@pytest.mark.parametrize("blur", [0.1, 1.0])
@pytest.mark.parametrize("deviations", [(1.0, 1.0), (1.0, 0.5), (0.4, 1.5)])
def test_tails_of_next_to_no_mass(blur, deviations):
    """Normal densities on a grid, with weights down to 1e-300."""
    grid = torch.linspace(-12, 12, 500, dtype=torch.float64)[:, None]
    s, t = deviations
    a, b = gaussian_weights(grid, s, 0.0), gaussian_weights(grid, t, 1.0)
    expected = gaussian_divergence(s, t, 1.0, blur)
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

    torch.testing.assert_close(slope(), slope(backend="dense", tol=1e-8), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("p", [1, 2])
def test_a_self_term_that_did_not_converge_is_told(p):
    x, b = problem("normal", 200, 2, True, seed=6)
    with pytest.warns(ConvergenceWarning, match="stopped after 1 iterations"):
        solved = sinkhorn_solve(x, x, None, b, p=p, blur=0.3, max_iterations=1)
    assert not solved.converged.any()
