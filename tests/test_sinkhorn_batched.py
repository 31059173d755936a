"""Batches of clouds in space (D > 1): each row is what its pair of clouds is alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from sinkhorn_cases import POWERS

from fairclip_losses.ops import sinkhorn_divergence, sinkhorn_solve

# Leading dimensions of x, y, a and b; None: no weights.
LEADS = {
    "clouds side by side": ((2,), (2,), None, None),
    "all pairs of clouds": ((3, 1), (2,), None, None),
    "all pairs, rows of weights on either": ((3, 1), (2,), (3, 1), (2,)),
    "all pairs, weights that cross the clouds": ((3, 1), (2,), (2,), (3, 1)),
    "clouds on one side": ((), (2,), None, (3, 2)),
    "rows of weights on each cloud": ((2,), (), (3, 1), (4, 1, 1)),
    "one cloud in a row": ((1,), (1,), (3,), None),
}


def draw(leads, sizes, dimension):
    """Return x, y, a and b; clouds of different reach, and absent points."""
    seeded = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.rand(*shape, generator=seeded, dtype=torch.float64)

    clouds = [
        some(*lead, count, dimension) * (0.5 + 2 * some(*lead, 1, 1))
        for lead, count in zip(leads[:2], sizes, strict=True)
    ]
    weights = [
        None if lead is None else (some(*lead, count) - 0.2).clamp(min=0.0)
        for lead, count in zip(leads[2:], sizes, strict=True)
    ]
    return *clouds, *weights


def each_alone(inputs, leads):
    """Yield the index of each row with its x, y, a and b."""
    tails = (2, 2, 1, 1)
    lead = torch.broadcast_shapes(*(lead or () for lead in leads))
    whole = [
        None if entry is None else entry.expand(*lead, *entry.shape[entry.dim() - tail :])
        for entry, tail in zip(inputs, tails, strict=True)
    ]
    for index in itertools.product(*map(range, lead)):
        yield index, [None if entry is None else entry[index] for entry in whole]


@pytest.mark.parametrize("case", LEADS)
@pytest.mark.parametrize("backend", ["auto", "dense", "streamed"])
@pytest.mark.parametrize("p", POWERS)
def test_rows_of_clouds_are_the_pairs_alone(case, backend, p):
    """Values, gradients and the plan; the truth is the same function of one pair at a time."""
    inputs = draw(LEADS[case], (7, 9), 2)
    options = {"p": p, "blur": 0.3, "backend": backend, "tol": 1e-10}
    there = [entry for entry in inputs if entry is not None]
    together, alone = ([entry.clone().requires_grad_() for entry in there] for _ in range(2))

    def with_none(entries):
        rest = iter(entries)
        return [None if entry is None else next(rest) for entry in inputs]

    values = sinkhorn_divergence(*with_none(together), **options)
    result = sinkhorn_solve(*inputs, **options)
    assert result.converged.all()
    factor = torch.sin(1.0 + torch.arange(values.numel()).double()).view(values.shape)
    (factor * values).sum().backward()
    for index, pair in each_alone(with_none(alone), LEADS[case]):
        value = sinkhorn_divergence(*pair, **options)
        torch.testing.assert_close(values[index], value, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(result.cost[index], value, rtol=1e-7, atol=1e-10)
        (factor[index] * value).backward()
    for found, true in zip(together, alone, strict=True):
        expected = torch.zeros_like(true) if true.grad is None else true.grad
        # an absent weight's slope is that of the place its point has, which other rows may give it
        there = found > 0 if found.dim() < 2 or found.shape[-1] != 2 else torch.ones_like(found) > 0
        torch.testing.assert_close(found.grad[there], expected[there], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("blur", [0.1, 0.5])
def test_rows_of_many_points(p, blur):
    """In tiles: above the size of Newton's method and of costs in memory."""
    x, y, *_ = draw(((2, 1), (2,), None, None), (300, 900), 3)
    values = sinkhorn_divergence(x, y, p=p, blur=blur)
    for index, pair in each_alone((x, y, None, None), ((2, 1), (2,), None, None)):
        value = sinkhorn_divergence(*pair, p=p, blur=blur)
        torch.testing.assert_close(values[index], value, rtol=1e-6, atol=1e-9)
