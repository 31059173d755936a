"""Problems that the Sinkhorn tests share; not a test file."""

from __future__ import annotations

import math

import numpy as np
import ot
import torch
from hypothesis import strategies as st
from sinkhorn_reference import cost_matrix
from torch import Tensor

from fairclip_losses.ops import sinkhorn_divergence

POWERS = (1, 2)
BLURS = (0.0, 0.02, 0.1, 2.0)

# Rounded so that ties are common, bounded so that float64 truths stay truths.
values = st.floats(-3, 3).map(lambda v: round(v, 1))
masses = st.one_of(st.just(0.0), st.floats(0.05, 1.0))


@st.composite
def clouds(draw, max_points: int = 9, rows: int | None = None):
    """Draw points (N, 1) and weights (N,), or (rows, N), each row with mass, float64."""
    n = draw(st.integers(1, max_points))
    points = draw(st.lists(values, min_size=n, max_size=n))
    count = 1 if rows is None else rows
    weights = draw(st.lists(masses, min_size=n * count, max_size=n * count))
    table = torch.tensor(weights, dtype=torch.float64).view(count, n)
    table[:, draw(st.integers(0, n - 1))] += 0.5
    return float64(points)[:, None], table[0] if rows is None else table


def float64(entries) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)


def random_problem(n: int = 7, m: int = 9, rows: int = 2, dimension: int = 1, seed: int = 0):
    """Return x (n, D), y (m, D), a (n,) and b (rows, m), float64, all weights positive."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dimension, generator=draw, dtype=torch.float64)
    y = torch.randn(m, dimension, generator=draw, dtype=torch.float64) + 0.3
    a = 0.1 + torch.rand(n, generator=draw, dtype=torch.float64)
    b = 0.1 + torch.rand(rows, m, generator=draw, dtype=torch.float64)
    return x, y, a, b


def value_and_gradients(x, y, a, b, **options):
    """Return the divergence and its gradients in all four."""
    inputs = [t.clone().requires_grad_() for t in (x, y, a, b)]
    value = sinkhorn_divergence(*inputs, **options)
    value.sum().backward()
    return value.detach(), [t.grad for t in inputs]


def common_points(x, weights, **options):
    """Return the costs (G,) of a batch and its groups and the gradients in points and weights."""
    points, rows = x.clone().requires_grad_(), weights.clone().requires_grad_()
    value = sinkhorn_divergence(points, points, None, rows, **options)
    value.sum().backward()
    return value.detach(), points.grad, rows.grad


def normalised(weights):
    return (weights / weights.sum()).numpy()


def pot_solution(x, y, a, b, p, blur, **options):
    """Return POT's converged plan (N, M), the value OT_eps, and its gradients in x and y."""
    a, b, cost = normalised(a), normalised(b), cost_matrix(x, y, p).numpy()
    plan = ot.bregman.sinkhorn_log(a, b, cost, blur**p, **options)
    kl = (plan * np.log(plan / np.outer(a, b))).sum()
    return plan, (plan * cost).sum() + blur**p * kl, *plan_gradients(plan, x, y, p)


def plan_gradients(plan, x, y, p):
    """Return the gradients of a plan's cost in x (N, D) and in y (M, D)."""
    shift = (x[:, None] - y).numpy()
    if p == 1:
        shift = shift / np.linalg.norm(shift, axis=-1, keepdims=True)
    return (plan[..., None] * shift).sum(1), -(plan[..., None] * shift).sum(0)


def gaussian_divergence(s, t, mean, blur):
    """The divergence of N(0, s^2) and N(mean, t^2) for p = 2 on a line.

    Mallasto et al. 2020 (arXiv:2006.03416), Janati et al. 2020 (arXiv:2006.02572), theorem 1.
    """

    def entropic(s, t):  # of the centred ones, up to what debiasing cancels
        d = math.sqrt(4 * s**2 * t**2 + blur**4)
        log = blur**2 * math.log(d + blur**2) if blur else 0.0
        return 0.5 * (s**2 + t**2 - d + log)

    return 0.5 * mean**2 + entropic(s, t) - 0.5 * entropic(s, s) - 0.5 * entropic(t, t)


def gaussian_weights(grid, deviation, mean):
    return torch.exp(-0.5 * ((grid[:, 0] - mean) / deviation) ** 2)


# Points (N, 1) and rows of weights (G, N) at which a solver may divide by 0.
HARD = {
    "one point": ([2.0], [[1.0], [3.0]]),
    "identical points": ([0.4] * 6, torch.rand(3, 6)),
    "all weight on one point": (torch.linspace(-1, 1, 6), torch.eye(6)[:3]),
    "ties": ([0, 1, 1, 1, 0, 2, 2], torch.rand(3, 7)),
    "a row of zeros": (torch.linspace(-1, 1, 5), [[0.0] * 5, [1.0] * 5]),
    "tiny weights": (torch.linspace(-1, 1, 4), [[1e-30, 1, 1e-12, 1], [1e-300, 1, 1e-12, 1]]),
    "no weights at all": (torch.linspace(-1, 1, 4), torch.zeros(2, 4)),
    "two far clusters": ([0, 1e-3, 2e-3, 1e3, 1e3 + 1], torch.rand(3, 5)),
    "one outlier": ([0, 0.1, 0.2, 0.3, 1e8], torch.rand(3, 5)),
}


def never_a_nan(kind, dimension, places, **options):
    """Hold the value and all gradients of a hard case to be finite, at offsets and scales."""
    points, table = (torch.as_tensor(entries, dtype=torch.float64) for entries in HARD[kind])
    points = torch.stack([points, *[points.cos() * (points != 0.4)] * (dimension - 1)], 1)
    for offset, scale in places:
        for dtype in (torch.float64, torch.float32):
            x = ((points + offset) * scale).to(dtype).requires_grad_()
            weights = table.to(dtype, copy=True).requires_grad_()
            value = sinkhorn_divergence(x, x, None, weights, **options)
            value.sum().backward()
            assert value.isfinite().all()
            assert x.grad.isfinite().all()
            assert weights.grad.isfinite().all()


def clustered(n, m, dimension, seed=0):
    """Return two samples of five narrow clusters and weights: mass must move between them."""
    draw = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(5, dimension, generator=draw, dtype=torch.float64)
    clouds = [
        centres[torch.randint(0, 5, (count,), generator=draw)]
        + 0.1 * torch.randn(count, dimension, generator=draw, dtype=torch.float64)
        for count in (n, m)
    ]
    weights = [0.1 + torch.rand(count, generator=draw, dtype=torch.float64) for count in (n, m)]
    return *clouds, *weights


def diameter(x, y):
    both = torch.cat([x, y]).detach()
    return float((both.amax(0) - both.amin(0)).norm())


def low_precision_loses_only_its_own_rounding(x, weights, **options):
    """The values are those of the rounded points, in float32; the gradient is rounded once."""
    value, grad, _ = common_points(x, weights.to(x.dtype), **options)
    exact, exact_grad, _ = common_points(x.double(), weights.double(), **options)
    assert value.dtype == torch.float32 and exact.dtype == exact_grad.dtype == torch.float64
    assert grad.dtype == x.dtype
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-9)
    rounding = torch.finfo(x.dtype).eps
    torch.testing.assert_close(grad.double(), exact_grad, rtol=2 * rounding, atol=1e-7)
