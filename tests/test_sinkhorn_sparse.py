"""Clouds in space at small blurs, above Newton's size: the dual on the few entries of a plan."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from fairclip_losses.ops.kernels.entries import large_entries
from fairclip_losses.ops.kernels.streamed import StreamedKernel
from fairclip_losses.ops.methods import alternate, sparse
from sinkhorn_cases import POWERS, one_thread, random_problem
from sinkhorn_reference import cost_matrix

from fairclip_losses.ops import sinkhorn_divergence, sinkhorn_solve


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with one_thread():
        yield


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(n, m, dimension):
    return [torch.rand(k, dimension, generator=draw(k), dtype=torch.float64) for k in (n, m)]


def clustered(n, m, dimension):
    centres = 3 * torch.randn(5, dimension, generator=draw(), dtype=torch.float64)
    return [
        centres[torch.randint(0, 5, (k,), generator=draw(k))]
        + 0.1 * torch.randn(k, dimension, generator=draw(k), dtype=torch.float64)
        for k in (n, m)
    ]


def two_far_groups(n, m, dimension):
    x, y = uniform(n, m, dimension)
    x[: n // 3] += 30.0
    y[: m // 2] += 30.0
    return x, y


def ties(n, m, dimension):
    return [(8 * points).round() / 8 for points in uniform(n, m, dimension)]


def one_point(n, m, dimension):
    return uniform(n, 1, dimension)


LAYOUTS = [uniform, clustered, two_far_groups, ties, one_point]


def problem(layout, dimension, n=90, m=70):
    x, y = layout(n, m, dimension)
    a, b = (0.1 + torch.rand(len(points), generator=draw(9)).double() for points in (x, y))
    a[3:9] = 0
    if len(y) > 9:
        b[2:5] = 0
    both = torch.cat([x, y])
    return x, y, a, b, float((both.amax(0) - both.amin(0)).norm())


@pytest.fixture
def descents(monkeypatch):
    """Return the outcomes of the descents on entries that were tried."""
    outcomes = []

    def descend(*arguments):
        outcomes.append(sparse.descend(*arguments))
        return outcomes[-1]

    monkeypatch.setattr(alternate, "descend", descend)
    return outcomes


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dimension", [2, 12])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cost_is_between_the_network_simplexs_and_its_entropy(p, dimension, layout):
    x, y, a, b, diameter = problem(layout, dimension)
    blur = 1e-3 * diameter
    result = sinkhorn_solve(x, y, a, b, p=p, blur=blur, backend="streamed")
    assert result.converged
    a, b = (a / a.sum()).numpy(), (b / b.sum()).numpy()
    exact = ot.emd2(a, b, cost_matrix(x, y, p).numpy())
    entropy = -sum((w[w > 0] * np.log(w[w > 0])).sum() for w in (a, b))
    slack = 1e-6 * diameter**p  # of marginals met to tol
    assert exact - slack <= result.transport_cost.item() <= exact + blur**p * entropy + slack


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("share", [1e-2, 1e-3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_all_costs(p, share, layout):
    """Against Newton's method on costs in memory, at a tol of 1e-11."""
    x, y, a, b, diameter = problem(layout, 3)
    found = []
    for options in ({"backend": "streamed"}, {"backend": "dense", "tol": 1e-11}):
        inputs = [t.clone().requires_grad_() for t in (x, y)]
        sinkhorn_divergence(*inputs, a, b, p=p, blur=share * diameter, **options).backward()
        found.append([t.grad for t in inputs])
    for few, every in zip(*found, strict=True):
        assert (few - every).norm() < 1e-5 * every.norm()


@pytest.mark.parametrize("p", POWERS)
def test_the_plan_is_pots(p, descents):
    x, y, a, b, diameter = problem(uniform, 2)
    blur = 0.015 * diameter
    result = sinkhorn_solve(x, y, a, b, p=p, blur=blur, backend="streamed", debias=False)
    assert any(outcome is not None for outcome in descents)
    a, b = (a / a.sum()).numpy(), (b / b.sum()).numpy()
    cost = cost_matrix(x, y, p).numpy()
    expected = ot.bregman.sinkhorn_log(
        a[a > 0], b[b > 0], cost[a > 0][:, b > 0], blur**p, stopThr=1e-9, numItermax=100_000
    )
    plan = np.exp((result.f[:, None].numpy() + result.g.numpy() - cost) / blur**p) * np.outer(a, b)
    assert np.abs(plan[a > 0][:, b > 0] - expected).sum() < 1e-5


def test_each_row_of_a_batch_is_solved(descents):
    x, y, a, b, diameter = problem(uniform, 2)
    rows = torch.stack([b, b.flip(0), torch.ones_like(b)])
    clouds = torch.stack([x, 2 * x, x + 1])[:, None]
    blur = 2e-3 * diameter
    result = sinkhorn_solve(clouds, y, a, rows, blur=blur, backend="streamed", debias=False)
    assert any(outcome is not None for outcome in descents)
    for i, j in np.ndindex(3, 3):
        alone = sinkhorn_solve(clouds[i, 0], y, a, rows[j], blur=blur, tol=1e-11, debias=False)
        assert result.transport_cost[i, j].item() == pytest.approx(alone.transport_cost.item())


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dimension", [2, 12])
def test_entries_are_all_large_ones(p, dimension):
    x, y, a, b = random_problem(23, 31, rows=1, dimension=dimension)
    log_a, log_b = (a / a.sum()).log(), (b[0] / b[0].sum()).log()
    kernel, epsilon = StreamedKernel(x, y, p), 0.3**p
    f, g = kernel.sweep(epsilon, log_a, log_b, torch.zeros(31).double())
    cost = cost_matrix(x, y, p)
    exponent = (f[:, None] + g - cost) / epsilon
    least = exponent.amax(1).clamp(max=0) - 5.0
    expected = [(i, j) for i in range(23) for j in range(31) if exponent[i, j] > least[i]]
    i, j, costs = large_entries(kernel, epsilon, f, g, 5.0, 1000)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == expected
    np.testing.assert_allclose(costs, cost[i, j], rtol=1e-9, atol=1e-12)
    assert large_entries(kernel, epsilon, f, g, 5.0, len(expected) // 3) is None


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dimension", [2, 20])
@pytest.mark.parametrize("share", [0.2, 0.05, 0.01])
@pytest.mark.parametrize("layout", [uniform, clustered, ties, "near"])
def test_float32_keeps_its_digits_in_gradients(p, dimension, share, layout):
    """Whether its rounding shows is estimated: then the blocks are in float64."""
    if layout == "near":
        x = uniform(150, 150, dimension)[0]
        y = x + 1e-3 * torch.randn(150, dimension, generator=draw(1)).double()
    else:
        x, y = layout(150, 140, dimension)
    x, y = x.float(), y.float()
    both = torch.cat([x, y])
    blur = share * float((both.amax(0) - both.amin(0)).norm())
    grads = []
    for points in (x.requires_grad_(), x.detach().double().requires_grad_()):
        options = {"iterations": 12, "backend": "streamed"}
        sinkhorn_divergence(points, y.to(points.dtype), p=p, blur=blur, **options).backward()
        grads.append(points.grad.double())
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[1].norm()
