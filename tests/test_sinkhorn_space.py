"""Clouds in space (D > 1): the streamed kernel, its solver, small blurs, memory."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from no_read_back import as_on_an_accelerator
from sinkhorn_cases import (
    POWERS,
    clustered,
    diameter,
    float64,
    plan_gradients,
    pot_solution,
    random_problem,
    value_and_gradients,
)
from sinkhorn_reference import cost_matrix
from torch.profiler import ProfilerActivity, profile

from fairclip_losses.ops import sinkhorn_divergence, sinkhorn_solve
from fairclip_losses.ops.sinkhorn_loop import Anderson, is_converged, is_near
from fairclip_losses.ops.streamed import StreamedKernel


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dimension", [2, 20])
def test_streamed_is_pots_plan(p, dimension):
    """Above the size of Newton's method: value and gradient off POT's converged plan."""
    x, y, a, b = random_problem(540, 500, rows=1, dimension=dimension)
    blur = 0.2 * diameter(x, y)
    options = {"stopThr": 1e-11, "numItermax": 2000}
    _, expected, *slopes = pot_solution(x, y, a, b[0], p, blur, **options)
    value, grads = value_and_gradients(x, y, a, b[0], p=p, blur=blur, debias=False)
    assert value.item() == pytest.approx(expected, rel=1e-9)
    for found, exact in zip(grads, slopes, strict=False):
        assert np.linalg.norm(found.numpy() - exact) < 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dimension", [2, 12])
@pytest.mark.parametrize("kind", [random_problem, clustered])
def test_small_blur_reaches_the_network_simplex(p, dimension, kind):
    """A ten-thousandth of the diameter: cost and gradient are those of POT's exact plan."""
    x, y, a, b = kind(60, 50, dimension=dimension)
    a, b = a / a.sum(), (b if b.dim() == 1 else b[0])
    b = b / b.sum()
    blur = 1e-4 * diameter(x, y)
    cost = cost_matrix(x, y, p)
    plan = ot.emd(a.numpy(), b.numpy(), cost.numpy())
    result = sinkhorn_solve(x, y, a, b, p=p, blur=blur, debias=False)
    assert result.converged
    exact = (plan * cost.numpy()).sum()
    assert exact * (1 - 1e-7) <= result.transport_cost.item() <= exact + 5 * blur**p
    if p == 2:  # at epsilon = 1e-8 of the cost the plan is that vertex
        _, (grad, _, _, _) = value_and_gradients(x, y, a, b, blur=blur, debias=False)
        shift, _ = plan_gradients(plan, x, y, p)
        assert np.linalg.norm(grad.numpy() - shift) < 1e-5 * np.linalg.norm(shift)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("share", [0.3, 0.05])
@pytest.mark.parametrize("kind", [random_problem, clustered])
def test_streamed_and_newton_agree(p, share, kind):
    """The two solvers have nothing in common but the problem."""
    x, y, a, b = kind(90, 110, dimension=3)
    options = {"p": p, "blur": share * diameter(x, y)}
    value, slopes = value_and_gradients(x, y, a, b, backend="streamed", **options)
    exact, truth = value_and_gradients(x, y, a, b, backend="dense", tol=1e-11, **options)
    torch.testing.assert_close(value, exact, rtol=1e-7, atol=0)
    for found, true in zip(slopes[:2], truth[:2], strict=True):
        assert (found - true).norm() < 1e-5 * true.norm()


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("backend", ["dense", "streamed"])
def test_laws(p, backend):
    """Zero from a measure to itself, symmetry, common shifts, scaling; never below zero."""
    x, y, a, b = random_problem(30, 40, rows=2, dimension=3)
    weights = torch.stack([a, a.flip(0)])

    def divergence(x, y, a, b, blur=0.4):
        return sinkhorn_divergence(x, y, a, b, p=p, blur=blur, backend=backend)

    # plans that miss a marginal by tol cost at most that times the range of the potentials less
    short = 1e-9 if backend == "dense" else 1e-6 * diameter(x, x) ** p / p
    assert divergence(x, x, weights, weights).abs().max() < short
    assert divergence(x, x.clone(), a, a).abs() < short
    expected = divergence(x, y, a, b)
    assert (expected > 0).all()
    close = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(divergence(y, x, b, a), expected, **close)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    moved = divergence(x[order] + 1e4, y + 1e4, a[order], b)
    torch.testing.assert_close(moved, expected, **close)
    scaled = divergence(-7 * x, -7 * y, a, b, blur=2.8)
    torch.testing.assert_close(scaled, 7**p * expected, **close)


@pytest.mark.parametrize("iterations", [1, 3, 30])
def test_fixed_iterations_end_at_the_target(iterations, monkeypatch):
    """So many passes, the last at the target: the marginal of y is that of epsilon."""
    x, y, a, b = random_problem(30, 20, rows=1, dimension=2)
    epsilons = []

    def update(self, epsilon, *rest, whole=StreamedKernel.update):
        epsilons.append(epsilon)
        return whole(self, epsilon, *rest)

    monkeypatch.setattr(StreamedKernel, "update", update)
    options = {"blur": 0.5, "iterations": iterations, "backend": "streamed", "debias": False}
    result = sinkhorn_solve(x, y, a, b[0], **options)
    assert len(epsilons) == result.iterations == iterations
    assert epsilons[-1] == 0.25 and epsilons == sorted(epsilons, reverse=True)
    log = (result.f[:, None] + result.g - cost_matrix(x, y, 2)) / 0.25
    columns = ((a / a.sum())[:, None] * log.exp()).sum(0)
    torch.testing.assert_close(columns, torch.ones_like(columns))  # g is f's c-transform
    if iterations == 30:
        assert result.converged


@pytest.mark.parametrize("backend", ["dense", "streamed"])
@pytest.mark.parametrize("p", POWERS)
def test_fixed_iterations_of_an_accelerator_converge(backend, p):
    x, y, a, b = random_problem(60, 50, dimension=3)
    truth, slopes = value_and_gradients(x, y, a, b, p=p, blur=0.3, tol=1e-11)
    with as_on_an_accelerator():
        value, found = value_and_gradients(x, y, a, b, p=p, blur=0.3, backend=backend)
    torch.testing.assert_close(value, truth, rtol=1e-8, atol=0)
    for one, other in zip(found, slopes, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("p", POWERS)
def test_weights_of_absent_points_have_their_gradients(p):
    """Rows leave absent points out, but the potential there is the c-transform too."""
    x, y, a, b = random_problem(40, 45, rows=1, dimension=3)
    a[3:6], b[0, 7:9] = 0, 0
    _, slopes = value_and_gradients(x, y, a, b[0], p=p, blur=0.6, backend="streamed", tol=1e-9)
    _, exact = value_and_gradients(x, y, a, b[0], p=p, blur=0.6, backend="dense", tol=1e-11)
    for found, true in zip(slopes, exact, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dimension", [2, 20])
@pytest.mark.parametrize("share", [0.2, 0.05, 0.01])
@pytest.mark.parametrize("layout", ["spread", "clustered", "ties", "near"])
def test_float32_leads_and_float64_ends(p, dimension, share, layout):
    """What the points in float32 lose of a gradient is its own rounding."""
    kind = clustered if layout == "clustered" else random_problem
    x, y, *_ = kind(150, 140, dimension=dimension)
    if layout == "ties":
        x, y = x.round(decimals=1), y.round(decimals=1)
    if layout == "near":
        y = x + 1e-3 * torch.sin(torch.arange(150.0)).double()[:, None]
    x, y = x.float(), y.float()
    options = {"p": p, "blur": share * diameter(x, y), "iterations": 12, "backend": "streamed"}
    grads = []
    for points in (x.requires_grad_(), x.detach().double().requires_grad_()):
        sinkhorn_divergence(points, y.to(points.dtype), **options).backward()
        grads.append(points.grad.double())
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[1].norm()


@given(st.floats(0.0, 0.95), st.floats(1e-9, 1e-2))
def test_iterations_end_where_the_way_that_is_left_is_short(rate, tol):
    """Errors that are a geometric series: what is left of it is a small part of tol."""
    errors = [1.0]
    while not is_converged(errors, tol):
        errors.append(errors[-1] * rate)
        assert len(errors) < 2000
    assert errors[-1] * rate / (1.0 - rate) <= 1e-2 * tol * (1 + 1e-6)
    assert errors[-1] <= tol


@pytest.mark.parametrize("noise", [0.0, 0.04])
def test_iterations_that_only_lead_end_where_rounding_stops_them(noise):
    errors = [10.0**-k for k in range(5)]
    while not is_near(errors, 1e-9):
        errors.append(2e-5 * (1 + noise * (-1) ** len(errors)))
    assert len(errors) <= 12


def test_anderson_solves_a_linear_map():
    """On a linear map it is GMRES: 10 updates do where plain ones leave 99 % of the slow mode."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=draw, dtype=torch.float64)).Q
    matrix = basis @ torch.diag(float64([0.999, 0.9, 0.5, 0.2, 0.0])) @ basis.T
    g = torch.randn(3, 5, generator=draw, dtype=torch.float64)
    memory = Anderson(torch.full((5,), 0.2).double())
    for _ in range(10):
        g = memory.step(g, g @ matrix, -g.square().sum(-1), 1e9)
    free = g - g.mean(-1, keepdim=True)  # potentials are free of a constant
    assert free.abs().max() < 1e-6


def peak_bytes(run):
    """Return the most that the CPU allocator had given out at a time, to operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(torch.tensor([event.nbytes() for event in events]).cumsum(0).max())


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dimension", [1, 3])
def test_memory_is_linear(p, dimension):
    """4096 x 4096 costs would be 64 MiB in float32; of NumPy's see test_sinkhorn_smooth.py."""
    x = torch.randn(4096, dimension, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = x.detach() + 0.5

    def run():
        sinkhorn_divergence(x, y, p=p, blur=0.5, iterations=2).backward()

    assert 2**14 < peak_bytes(run) < 8 * 2**20
