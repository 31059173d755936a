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
from sinkhorn_cases import BLURS, POWERS, clouds, float64, random_problem
from sinkhorn_reference import (
    cost_matrix,
    entropic_cost,
    sinkhorn_divergence_reference,
)

from fairclip_losses.ops import sinkhorn_divergence

quick = settings(max_examples=40, deadline=None)


def normalised(weights):
    return (weights / weights.sum()).numpy()


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
def test_exact_p1_is_scipys_wasserstein_distance(one, other):
    (x, a), (y, b) = one, other
    expected = wasserstein_distance(x[:, 0], y[:, 0], a, b)
    assert sinkhorn_divergence(x, y, a, b, p=1, blur=0).item() == pytest.approx(expected, abs=1e-12)


@quick
@given(clouds(), clouds())
def test_exact_p2_is_half_of_pots_squared_cost(one, other):
    (x, a), (y, b) = one, other
    expected = 0.5 * ot.emd2_1d(
        x[:, 0].numpy(), y[:, 0].numpy(), normalised(a), normalised(b), metric="sqeuclidean"
    )
    assert sinkhorn_divergence(x, y, a, b, p=2, blur=0).item() == pytest.approx(expected, abs=1e-12)


@quick
@given(clouds(), clouds())
def test_exact_is_pots_wasserstein_1d(one, other):
    (x, a), (y, b) = one, other
    for p in POWERS:
        expected = ot.wasserstein_1d(
            x[:, 0].numpy(), y[:, 0].numpy(), normalised(a), normalised(b), p=p
        )
        actual = p * sinkhorn_divergence(x, y, a, b, p=p, blur=0)
        assert actual.item() == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("p", POWERS)
@settings(max_examples=10, deadline=None)
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
def test_tiny_blur_in_the_plane_reaches_the_linear_programme(p):
    x, y, a, b = random_problem(8, 8, rows=1, dimension=2)
    expected = plan_of_linear_programme(
        cost_matrix(x, y, p).numpy(), normalised(a), normalised(b[0])
    )
    actual = sinkhorn_divergence(x, y, a, b[0], p=p, blur=1e-4 ** (1 / p), debias=False)
    assert actual.item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("blur", [0.3, 1.0])
@pytest.mark.parametrize(("n", "dimension"), [(6, 1), (120, 1), (6, 3)])
def test_entropic_is_pots_with_the_entropy_taken_off(p, blur, n, dimension):
    x, y, a, b = random_problem(n, n + 2, rows=1, dimension=dimension)
    a, b = normalised(a), normalised(b[0])
    epsilon = blur**p
    plan = ot.bregman.sinkhorn_log(
        a, b, cost_matrix(x, y, p).numpy(), epsilon, stopThr=1e-13, numItermax=100_000
    )
    kl = (plan * np.log(plan / np.outer(a, b))).sum()
    expected = (plan * cost_matrix(x, y, p).numpy()).sum() + epsilon * kl
    actual = sinkhorn_divergence(x, y, float64(a), float64(b), p=p, blur=blur, debias=False)
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
    """Mallasto et al. 2020 (arXiv:2006.03416), Janati et al. 2020 (arXiv:2006.02572)."""
    epsilon = blur**2
    grid = torch.linspace(-6, 6, 201, dtype=torch.float64)[:, None]
    s, t, mean = 1.0, 0.6, 0.5

    def gaussian(deviation, mean):
        return torch.exp(-0.5 * ((grid[:, 0] - mean) / deviation) ** 2)

    def entropic(s, t):  # OT_eps of the centred Gaussians, up to what debiasing cancels
        d = math.sqrt(4 * s**2 * t**2 + epsilon**2)
        log = 0.0 if epsilon == 0 else epsilon * (1 - math.log(2 * epsilon) + math.log(d + epsilon))
        return 0.5 * (s**2 + t**2 - d + log)

    expected = 0.5 * mean**2 + entropic(s, t) - 0.5 * entropic(s, s) - 0.5 * entropic(t, t)
    actual = sinkhorn_divergence(grid, grid, gaussian(s, 0), gaussian(t, mean), blur=blur)
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
