"""Problems that the Sinkhorn tests share; not a test file."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
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


def value_and_slopes(x, y, a, b, **options):
    """Return the divergence and its gradients in all four."""
    inputs = [t.clone().requires_grad_() for t in (x, y, a, b)]
    value = sinkhorn_divergence(*inputs, **options)
    value.sum().backward()
    return value.detach(), [t.grad for t in inputs]


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
    x = x.requires_grad_()
    truth = x.detach().double().requires_grad_()
    value = sinkhorn_divergence(x, x, None, weights.to(x.dtype), **options)
    exact = sinkhorn_divergence(truth, truth, None, weights.double(), **options)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-9)
    value.sum().backward()
    exact.sum().backward()
    rounding = torch.finfo(x.dtype).eps
    torch.testing.assert_close(x.grad.double(), truth.grad, rtol=2 * rounding, atol=1e-7)
