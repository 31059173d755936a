"""p = 1 on a line in NumPy: products with the kernel, Newton's equations on fewer points."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from fairclip_losses.ops import sinkhorn_divergence, sinkhorn_solve
from fairclip_losses.ops.host.laplace.kernel import LaplaceKernel
from fairclip_losses.ops.host.laplace.nodes import Nodes
from fairclip_losses.ops.host.laplace.self_terms import solve_self_by_newton
from fairclip_losses.ops.host.laplace.start import local_start
from fairclip_losses.ops.host.newton import LOG_ZERO, solve_pair


@st.composite
def lines(draw, most=12):
    """Return sorted distinct points of which some lie close together, from 1e-9 to 1e3 apart."""
    gaps = draw(st.lists(st.floats(-9, 3), min_size=0, max_size=most - 1))
    return np.add.accumulate([0.0, *(10.0**gap for gap in gaps)])


def rows(points, count, seed):
    """Return rows of weights of which some are 0, of sum one."""
    draw = np.random.default_rng(seed)
    weights = draw.random((count, points.size)) * (draw.random((count, points.size)) < 0.7)
    weights[:, draw.integers(points.size)] += 0.1
    return weights / weights.sum(-1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(lines(), st.sampled_from([1e-3, 0.1, 1.0, 100.0]), st.integers(0, 99))
def test_products_are_those_of_all_entries(z, epsilon, seed):
    """On short lines and on long ones, with absent points and potentials that follow the cost."""
    draw = np.random.default_rng(seed)
    exponent = draw.choice([-1.0, 0.0, 1.0], (3, 1)) * z / epsilon + draw.normal(size=(3, z.size))
    exponent[draw.random(exponent.shape) < 0.2] = LOG_ZERO
    exponent[:, 0] = 0.0
    entries = exponent[:, None, :] - np.abs(z[:, None] - z) / epsilon
    expected = logsumexp(entries, -1)
    kernel = LaplaceKernel(z, epsilon)
    # exponents lose the digits that their size takes
    rounding = 1e-12 + np.finfo(float).eps * z[-1] / epsilon
    np.testing.assert_allclose(kernel.log_product(exponent), expected, rtol=0, atol=4 * rounding)
    plan = np.exp(entries - expected[..., None])
    expected_pull = (plan * np.sign(z[:, None] - z)).sum(-1)
    np.testing.assert_allclose(kernel.pull(exponent), expected_pull, rtol=0, atol=8 * rounding)


@settings(max_examples=40, deadline=None)
@given(st.integers(129, 400), st.floats(0.01, 100.0), st.integers(0, 99))
def test_nodes_keep_masses_and_straight_lines(count, length, seed):
    draw = np.random.default_rng(seed)
    t = np.sort(length * draw.random(count) ** 3)
    nodes = Nodes(t)
    masses, slopes = draw.random((2, count)), draw.normal(size=(2, nodes.size))
    at_nodes = nodes.at(np.stack([t, t]))
    np.testing.assert_allclose(nodes.spread(at_nodes), [t, t], atol=1e-12 * length)
    gathered = nodes.gather(masses)
    np.testing.assert_allclose(gathered.sum(-1), masses.sum(-1))
    np.testing.assert_allclose((gathered * at_nodes).sum(-1), (masses * t).sum(-1))
    # gathering is the transpose of spreading
    np.testing.assert_allclose(
        (gathered * slopes).sum(-1), (masses * nodes.spread(slopes)).sum(-1), atol=1e-10
    )


@settings(max_examples=40, deadline=None)
@given(lines(), st.sampled_from([0.1, 1.0, 100.0]), st.integers(0, 99))
def test_both_iterations_meet_the_marginals(z, epsilon, seed):
    """The plan of all entries has the marginals; that of a measure and itself is symmetric."""
    a, b = rows(z, 3, seed), rows(z, 3, seed + 1)
    kernel = LaplaceKernel(z, epsilon)
    best, taken = solve_pair(kernel, a, b, local_start(kernel, a, b), 1e-6, 40, False)
    own, _ = solve_self_by_newton(kernel, a, 1e-6, 100, False)
    cost = np.abs(z[:, None] - z)
    assert taken < 40
    for f, g, other in ((best.due, best.g, b), (own, own, a)):
        exponent = (f[:, :, None] + g[:, None, :] - cost) / epsilon
        plan = a[:, :, None] * other[:, None, :] * np.exp(np.minimum(exponent, 50.0))
        np.testing.assert_allclose(plan.sum(2), a, rtol=0, atol=2e-6)
        np.testing.assert_allclose(plan.sum(1), other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("share", [1e-4, 3e-4, 1e-3])
def test_clusters_that_hardly_couple_do_not_stall(share):
    """Each group's points are as many blurs apart, and its levels meet the batch's at many cuts.

    A plan moves less than rounding across such a cut. A warning would be an error here.
    """
    scores = torch.randn(1024, 1, generator=torch.Generator().manual_seed(0)).double()
    scores = scores / (scores.max() - scores.min())
    groups = (torch.arange(1024) % 8 == torch.arange(8)[:, None]).double()
    result = sinkhorn_solve(scores, scores, None, groups, p=1, blur=share)
    assert result.converged.all() and result.iterations < 15


@pytest.mark.parametrize("share", [3e-4, 1e-3, 3e-3])
def test_a_tight_cluster_among_lonely_points_does_not_stall(share):
    """Nine scores of ten within some blurs, the others many blurs from each other."""
    draw = torch.Generator().manual_seed(3)
    near, far = torch.rand(256, generator=draw) < 0.9, 2 * torch.rand(256, generator=draw) - 1
    scores = torch.where(near, 1e-3 * torch.randn(256, generator=draw), far).double()[:, None]
    groups = (torch.arange(256) % 4 == torch.arange(4)[:, None]).double()
    blur = share * float(scores.max() - scores.min())
    result = sinkhorn_solve(scores, scores, None, groups, p=1, blur=blur)
    assert result.converged.all() and result.iterations < 25
    slopes = []
    for options in ({}, {"backend": "dense", "tol": 1e-10}):
        x = scores.clone().requires_grad_()
        sinkhorn_divergence(x, x, None, groups, p=1, blur=blur, **options).sum().backward()
        slopes.append(x.grad)
    assert (slopes[0] - slopes[1]).norm() < 2e-7 * slopes[1].norm()


@pytest.mark.parametrize("blur", [0.02, 0.3, 5.0])
@pytest.mark.parametrize("clustered", [True, False])
def test_fewer_nodes_reach_the_same_optimum(blur, clustered):
    """Against Newton's method on all costs."""
    scores = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)).double()
    scores = torch.where(scores > 1.0, scores, 0.01 * scores) if clustered else scores
    groups = (torch.arange(400) % 3 == torch.arange(3)[:, None]).double()
    assert Nodes(np.sort(scores[:, 0].numpy()) / blur).size < 400 or blur < 0.1
    found = []
    for options in ({}, {"backend": "dense", "tol": 1e-11}):
        x = scores.clone().requires_grad_()
        value = sinkhorn_divergence(x, x, None, groups, p=1, blur=blur, **options)
        value.sum().backward()
        found.append((value.detach(), x.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-8, atol=1e-13)
    assert (found[0][1] - found[1][1]).norm() < 1e-7 * found[1][1].norm()


def test_a_step_of_no_use_is_replaced(monkeypatch):
    """Means of the potential and its softmin converge by themselves, if slowly."""
    z = np.add.accumulate(np.random.default_rng(0).random(20))
    a, kernel = rows(z, 2, 0), LaplaceKernel(z, 0.7)
    expected, _ = solve_self_by_newton(kernel, a, 1e-6, 100, False)
    monkeypatch.setattr(kernel, "self_update", lambda a, f, due: f + 5.0)
    found, _ = solve_self_by_newton(kernel, a, 1e-6, 100, False)
    # the marginals are met to 1e-8: so far are the potentials, weighted
    assert (a * np.abs(found - expected)).sum() < 1e-7
