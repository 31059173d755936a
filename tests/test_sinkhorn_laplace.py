"""p = 1 with a blur on a CPU line: products with the kernel, marginals, hard layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from sinkhorn_cases import common_points

from fairclip_losses.ops import sinkhorn_solve
from fairclip_losses.ops.laplace_line import LaplaceKernel
from fairclip_losses.ops.line_newton import LOG_ZERO


@st.composite
def lines(draw, least=1, most=12):
    """Return sorted distinct points of which some lie close together, from 1e-9 to 1e3 apart."""
    gaps = draw(st.lists(st.floats(-9, 3), min_size=least - 1, max_size=most - 1))
    return np.add.accumulate([0.0, *(10.0**gap for gap in gaps)])


def rows(points, count, seed):
    """Return rows of weights of which some are 0, of sum one."""
    draw = np.random.default_rng(seed)
    weights = draw.random((count, points.size)) * (draw.random((count, points.size)) < 0.7)
    weights[:, draw.integers(points.size)] += 0.1
    return weights / weights.sum(-1, keepdims=True)


@settings(max_examples=60)
@given(lines(least=3), st.sampled_from([1e-3, 0.1, 1.0, 100.0]), st.integers(0, 99))
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
    expected_mean = (plan * np.sign(z[:, None] - z)).sum(-1)
    np.testing.assert_allclose(kernel.mean_sign(exponent), expected_mean, rtol=0, atol=8 * rounding)


@settings(max_examples=40)
@given(lines(), st.sampled_from([0.1, 1.0, 100.0]), st.integers(0, 99))
def test_couplings_meet_the_marginals(z, epsilon, seed):
    """The coupling of all entries has the marginals, that of a measure and itself too."""
    a, b = (rows(z, 3, seed + k) for k in (0, 1))
    x = torch.from_numpy(z)[:, None]
    found = sinkhorn_solve(x, x, torch.from_numpy(a), torch.from_numpy(b), p=1, blur=epsilon)
    assert found.iterations < 40
    f, g, own = (part.numpy() for part in (found.f, found.g, found.f_self))
    cost = np.abs(z[:, None] - z)
    for one, two, other in ((f, g, b), (own, own, a)):
        exponent = (one[:, :, None] + two[:, None, :] - cost) / epsilon
        plan = a[:, :, None] * other[:, None, :] * np.exp(np.minimum(exponent, 50.0))
        np.testing.assert_allclose(plan.sum(2), a, rtol=0, atol=2e-6)
        np.testing.assert_allclose(plan.sum(1), other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("share", [1e-4, 3e-4, 1e-3])
def test_clusters_that_hardly_couple_do_not_stall(share):
    """Each group's points are as many blurs apart; its cumulative weights meet the batch's often.

    A coupling moves less than rounding across such a cut. A warning would be an error here.
    """
    scores = torch.randn(1024, 1, generator=torch.Generator().manual_seed(0)).double()
    scores = scores / (scores.max() - scores.min())
    groups = (torch.arange(1024) % 8 == torch.arange(8)[:, None]).double()
    result = sinkhorn_solve(scores, scores, None, groups, p=1, blur=share)
    assert result.converged.all() and result.iterations < 15


def is_that_of_all_costs(scores, groups, blur):
    """Hold costs and gradient to Newton's method on all costs."""
    (value, slopes, _), (expected, expected_slopes, _) = (
        common_points(scores, groups, p=1, blur=blur, **options)
        for options in ({}, {"backend": "dense", "tol": 1e-11})
    )
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-13)
    assert (slopes - expected_slopes).norm() < 1e-7 * expected_slopes.norm()


@pytest.mark.parametrize("blur", [0.02, 0.3, 5.0])
@pytest.mark.parametrize("clustered", [True, False])
def test_many_points_within_a_blur_reach_the_optimum(blur, clustered):
    """Newton's equations are solved on fewer points; against Newton's method on all costs."""
    scores = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)).double()
    scores = torch.where(scores > 1.0, scores, 0.01 * scores) if clustered else scores
    groups = (torch.arange(400) % 3 == torch.arange(3)[:, None]).double()
    is_that_of_all_costs(scores, groups, blur)


@pytest.mark.parametrize("share", [3e-4, 1e-3, 3e-3])
def test_a_tight_cluster_among_lonely_points_does_not_stall(share):
    """Nine scores of ten within some blurs, the others many blurs from each other."""
    draw = torch.Generator().manual_seed(3)
    near, far = torch.rand(256, generator=draw) < 0.9, 2 * torch.rand(256, generator=draw) - 1
    scores = torch.where(near, 1e-3 * torch.randn(256, generator=draw), far).double()[:, None]
    groups = (torch.arange(256) % 4 == torch.arange(4)[:, None]).double()
    blur = share * float(scores.max() - scores.min())
    is_that_of_all_costs(scores, groups, blur)
    assert sinkhorn_solve(scores, scores, None, groups, p=1, blur=blur).iterations < 25
