"""The value of the divergence against solvers that this project did not write."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from scipy.optimize import linprog
from scipy.stats import wasserstein_distance
from sinkhorn_cases import (
    BLURS,
    POWERS,
    clouds,
    float64,
    gaussian_divergence,
    gaussian_weights,
    normalised,
    pot_solution,
    random_problem,
)
from sinkhorn_reference import (
    cost_matrix,
    entropic_cost,
    sinkhorn_divergence_reference,
)

from fairclip_losses.ops import sinkhorn_divergence

quick = settings(max_examples=40)


def plan_of_linear_programme(cost, a, b):
    """Return the cost of the cheapest coupling, by SciPy's simplex on all of its entries."""
    n, m = cost.shape
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    answer = linprog(
        cost.ravel(), A_eq=np.vstack([rows, columns])[:-1], b_eq=np.concatenate([a, b])[:-1]
    )
    assert answer.success
    return answer.fun


@quick
@given(clouds(), clouds())
def test_exact_is_scipys_and_pots_distance(one, other):
    (x, a), (y, b) = one, other
    costs = [sinkhorn_divergence(x, y, a, b, p=p, blur=0).item() for p in POWERS]
    points = x[:, 0].numpy(), y[:, 0].numpy()
    weights = normalised(a), normalised(b)
    assert costs[0] == pytest.approx(wasserstein_distance(*points, a, b), abs=1e-12)
    squared = ot.emd2_1d(*points, *weights, metric="sqeuclidean")
    assert costs[1] == pytest.approx(squared / 2, abs=1e-12)
    for p, cost in zip(POWERS, costs, strict=True):
        expected = ot.wasserstein_1d(*points, *weights, p=p)
        assert p * cost == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("p", POWERS)
@settings(max_examples=10)
@given(one=clouds(max_points=6), other=clouds(max_points=6))
def test_tiny_blur_reaches_the_linear_programme(p, one, other):
    (x, a), (y, b) = one, other
    cost = cost_matrix(x, y, p).numpy()
    expected = plan_of_linear_programme(cost, normalised(a), normalised(b))
    actual = sinkhorn_divergence(x, y, a, b, p=p, blur=1e-3 if p == 1 else 1e-2, debias=False)
    # KL(P | a b^T) is at most the entropy of either measure
    entropy = math.log(max(len(x), len(y)))
    assert expected - 1e-6 <= actual.item() <= expected + 1e-3 * entropy + 1e-6


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("blur", [0.3, 1.0])
@pytest.mark.parametrize(("n", "dimension"), [(6, 1), (120, 1), (6, 3)])
def test_entropic_is_pots_with_the_entropy_taken_off(p, blur, n, dimension):
    x, y, a, b = random_problem(n, n + 2, rows=1, dimension=dimension)
    options = {"stopThr": 1e-13, "numItermax": 100_000}
    _, expected, *_ = pot_solution(x, y, a, b[0], p, blur, **options)
    actual = sinkhorn_divergence(x, y, a, b[0], p=p, blur=blur, debias=False)
    assert actual.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("blur", [0.5, 2.0])
@pytest.mark.parametrize("dimension", [1, 2])
@pytest.mark.parametrize("debias", [True, False])
def test_entropic_is_the_dense_reference(p, blur, dimension, debias):
    x, y, a, b = random_problem(6, 5, rows=3, dimension=dimension, seed=1)
    actual = sinkhorn_divergence(x, y, a, b, p=p, blur=blur, debias=debias)
    for row, value in zip(b, actual, strict=True):
        expected = sinkhorn_divergence_reference(
            x, y, a, row, p=p, blur=blur, debias=debias, iterations=1000
        )
        assert value.item() == pytest.approx(expected.item(), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("blur", BLURS)
@pytest.mark.parametrize("p", POWERS)
def test_two_diracs_are_their_cost_apart(p, blur):
    """One coupling exists, so the entropy adds nothing at any blur."""
    x, y = float64([[1.0]]), float64([[3.5]])
    assert sinkhorn_divergence(x, y, p=p, blur=blur).item() == pytest.approx(2.5**p / p)


@pytest.mark.parametrize(
    ("dimension", "blur", "backend"),
    [*((1, blur, "auto") for blur in BLURS), (3, 0.5, "dense"), (3, 0.5, "streamed")],
)
def test_a_shift_costs_half_its_square(dimension, blur, backend):
    """For p = 2 the debiased divergence of a measure and its shift by t is t^2 / 2, exactly."""
    x, _, a, _ = random_problem(50, dimension=dimension)
    shift = float64([0.7, -0.5, 0.1])[:dimension]
    shifted = sinkhorn_divergence(x, x + shift, a, a, blur=blur, backend=backend)
    assert shifted.item() == pytest.approx(0.5 * float(shift.square().sum()), rel=1e-7)


@pytest.mark.parametrize("blur", [0.0, 0.5, 1.5])
def test_gaussians_have_a_closed_form(blur):
    grid = torch.linspace(-6, 6, 201, dtype=torch.float64)[:, None]
    weights = gaussian_weights(grid, 1.0, 0.0), gaussian_weights(grid, 0.6, 0.5)
    actual = sinkhorn_divergence(grid, grid, *weights, blur=blur)
    expected = gaussian_divergence(1.0, 0.6, 0.5, blur)
    assert actual.item() == pytest.approx(expected, rel=3e-3 if blur == 0 else 1e-6)


def test_the_reference_is_a_dual_value():
    """The reference's own check: at most the cost of any plan, here the product of the weights."""
    x, y, a, b = random_problem(rows=1)
    a, b = a / a.sum(), b[0] / b[0].sum()
    upper = a @ cost_matrix(x, y, 2) @ b
    assert entropic_cost(x, y, a, b, p=2, blur=0.5, iterations=200) < upper


@pytest.mark.parametrize("p", POWERS)
def test_blur_runs_from_transport_to_the_distance_of_moments(p):
    """S is near the exact cost at small blur; at large, the means' distance, for p = 1 energy's."""
    x, y, a, b = random_problem(12, 10, rows=1)
    exact = sinkhorn_divergence(x, y, a, b[0], p=p, blur=0)
    small = sinkhorn_divergence(x, y, a, b[0], p=p, blur=0.003)
    assert small.item() == pytest.approx(exact.item(), rel=2e-2)
    if p == 2:
        means = (normalised(a) @ x.numpy() - normalised(b[0]) @ y.numpy())[0]
        large = sinkhorn_divergence(x, y, a, b[0], blur=1e3)
        assert large.item() == pytest.approx(0.5 * means**2, rel=1e-4)
    else:
        one, other = normalised(a), normalised(b[0])
        between, within_x, within_y = (
            cost_matrix(*pair, 1).numpy() for pair in ((x, y), (x, x), (y, y))
        )
        energy = one @ between @ other - 0.5 * (one @ within_x @ one + other @ within_y @ other)
        large = sinkhorn_divergence(x, y, a, b[0], p=1, blur=1e5)
        assert large.item() == pytest.approx(energy, rel=1e-4)
