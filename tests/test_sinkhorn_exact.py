"""The exact cost on a line: against rational arithmetic, POT's autograd, and itself."""

from __future__ import annotations

import math
from contextlib import nullcontext
from fractions import Fraction

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_read_back import as_on_an_accelerator
from sinkhorn_cases import POWERS, clouds, float64

from fairclip_losses.ops import sinkhorn_divergence
from fairclip_losses.ops.exact import exact_potentials

every_power = pytest.mark.parametrize("p", POWERS)


# Nobody looks whether points coincide on an accelerator.
every_device = pytest.mark.parametrize("device", [nullcontext, as_on_an_accelerator])


def rational(x, y, a, b, p):
    """Return cost and gradients in x and y of one pair of measures, as fractions.

    Ties share by the convention of `ops.exact`.
    """
    x, y, a, b = ([Fraction(float(entry)) for entry in entries] for entries in (x, y, a, b))
    total_a, total_b = sum(a), sum(b)
    if not (total_a and total_b):
        return Fraction(0), [Fraction(0)] * len(x), [Fraction(0)] * len(y)
    a, b = [w / total_a for w in a], [w / total_b for w in b]
    places = sorted({*x, *y})
    mass = [{z: Fraction(0) for z in places} for _ in range(2)]
    for points, weights, at in ((x, a, mass[0]), (y, b, mass[1])):
        for z, w in zip(points, weights, strict=True):
            at[z] += w
    if p == 1:
        cost, excess, slope = Fraction(0), Fraction(0), {}
        for z, after in zip(places, [*places[1:], places[-1]], strict=True):
            before, excess = excess, excess + mass[0][z] - mass[1][z]
            most = abs(before) + abs(excess)
            slope[z] = -(before + excess) / most if most else Fraction(0)
            cost += abs(excess) * (after - z)
        return cost, [w * slope[z] for z, w in zip(x, a, strict=True)], [
            -w * slope[z] for z, w in zip(y, b, strict=True)
        ]  # fmt: skip
    left = [dict(at) for at in mass]
    moved = [{z: Fraction(0) for z in places} for _ in range(2)]
    cost, i, j = Fraction(0), 0, 0
    while i < len(places) and j < len(places):
        one, other = places[i], places[j]
        step = min(left[0][one], left[1][other])
        cost += step * (one - other) ** 2 / 2
        moved[0][one] += step * (one - other)
        moved[1][other] += step * (other - one)
        left[0][one] -= step
        left[1][other] -= step
        i, j = i + (not left[0][one]), j + (not left[1][other])
    return cost, *(
        [w * moved[k][z] / mass[k][z] if w else Fraction(0) for z, w in zip(zs, ws, strict=True)]
        for k, (zs, ws) in enumerate(((x, a), (y, b)))
    )


@st.composite
def problems(draw):
    """Draw points and weights (None, ragged, rows without mass) whose leading dims broadcast."""
    lead = draw(st.sampled_from([(), (3,), (2, 3)]))
    weights = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0])
    places = st.one_of(st.integers(-3, 3).map(float), st.floats(-3, 3))

    def tensor(size, entries):
        shape = (*lead[draw(st.integers(0, len(lead))) :], size)
        count = math.prod(shape)
        return float64(draw(st.lists(entries, min_size=count, max_size=count))).view(shape)

    sizes = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    points = [tensor(size, places)[..., None] for size in sizes]
    rows = [tensor(size, weights) if draw(st.booleans()) else None for size in sizes]
    if draw(st.booleans()):  # common points
        points[1] = points[0]
        rows[1] = tensor(sizes[0], weights)
    return *points, *rows


@every_power
@settings(max_examples=60)
@given(problem=problems(), device=st.sampled_from([nullcontext, as_on_an_accelerator]))
def test_costs_and_gradients_are_those_of_rational_arithmetic(p, device, problem):
    """Ties, absent points, rows without mass, N != M; each row's cost has its own factor."""
    x, y, a, b = problem
    common = x is y
    x = x.clone().requires_grad_()
    y = x if common else y.clone().requires_grad_()
    with device():
        cost = sinkhorn_divergence(x, y, a, b, p=p, blur=0)
        factor = 1.0 + torch.arange(cost.numel(), dtype=torch.float64).view(cost.shape)
        (factor * cost).sum().backward()
    lead = cost.shape
    rows = [
        (torch.ones(t.shape[:-1], dtype=t.dtype) if w is None else w).expand(*lead, -1)
        for t, w in ((x, a), (y, b))
    ]
    points = [t[..., 0].detach().expand(*lead, -1) for t in (x, y)]
    due = [torch.zeros_like(t) for t in points]
    for index in torch.cartesian_prod(*map(torch.arange, (*lead, 1))).view(-1, len(lead) + 1):
        at = tuple(index[:-1].tolist())
        true, *slopes = rational(*(t[at] for t in (*points, *rows)), p)
        assert cost[at].item() == pytest.approx(float(true), rel=1e-12, abs=1e-14)
        for k in range(2):
            due[k][at] = factor[at] * float64([float(slope) for slope in slopes[k]])
    due = [t.sum_to_size(of.shape[:-1]) for t, of in zip(due, (x, y), strict=True)]
    expected = [due[0] + due[1]] if common else due
    for found, want in zip((x, y), expected, strict=False):
        torch.testing.assert_close(found.grad[..., 0], want, rtol=1e-9, atol=1e-12)


@every_power
@every_device
def test_the_gradient_of_many_scores_is_that_of_rational_arithmetic(p, device):
    """A group of a batch of a thousand differs from it in the last digits of long sums."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 1, generator=draw).double().requires_grad_()
    b = (torch.rand(1024, generator=draw) < 0.3).double()
    with device():
        cost = sinkhorn_divergence(x, x, None, b, p=p, blur=0)
        cost.backward()
    points = x[:, 0].tolist()
    true, *slopes = rational(points, points, [1.0] * 1024, b, p)
    want = float64([float(one + other) for one, other in zip(*slopes, strict=True)])
    assert cost.item() == pytest.approx(float(true), rel=1e-12)
    assert (x.grad[:, 0] - want).norm() < 3e-11 * want.norm()


@every_power
@settings(max_examples=60)
@given(batch=clouds(max_points=30, rows=3), seed=st.integers(0, 9))
def test_a_batch_and_its_groups_are_pots(p, batch, seed):
    """Cost and gradient of POT's autograd; ties moved apart, since it tears them as they come."""
    x, weights = batch
    n = len(x)
    x = x + 1e-3 * torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:, None]
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    points, mass = theirs.expand(n, 3), (weights / weights.sum(1, keepdim=True)).T
    expected = ot.wasserstein_1d(points, points, torch.full_like(mass, 1 / n), mass, p=p) / p
    cost = sinkhorn_divergence(ours, ours, None, weights, p=p, blur=0)
    rows = torch.arange(1.0, 4.0, dtype=torch.float64)
    (rows * cost).sum().backward()
    (rows * expected).sum().backward()
    torch.testing.assert_close(cost, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@every_power
@settings(max_examples=40)
@given(one=clouds(), other=clouds())
def test_potentials_are_feasible_and_as_good_as_the_plan(p, one, other):
    (x, a), (y, b) = one, other
    there, others = a > 0, b > 0
    x, y, a, b = x[there, 0], y[others, 0], a[there] / a.sum(), b[others] / b.sum()
    f, g = exact_potentials(x, y, a, b, p)
    ground = (x[:, None] - y).abs() ** p / p
    g = g + (ground - f[:, None] - g).min()
    cost = sinkhorn_divergence(x[:, None], y[:, None], a, b, p=p, blur=0)
    torch.testing.assert_close(a @ f + b @ g, cost, rtol=1e-9, atol=1e-12)


@every_power
def test_an_absent_point_far_away_finds_no_mass_of_rounding(p):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1, generator=draw, dtype=torch.float64)
    a, b = torch.rand(2, 40, generator=draw, dtype=torch.float64)
    far = torch.cat([x, float64([[9e99], [-9e98]])]).requires_grad_()
    among = [torch.nn.functional.pad(weights, (0, 2)) for weights in (a, b)]
    alone = sinkhorn_divergence(x, x, a, b, p=p, blur=0)
    cost = sinkhorn_divergence(far, far, *among, p=p, blur=0)
    cost.backward()
    torch.testing.assert_close(cost, alone, rtol=1e-12, atol=0.0)
    assert far.grad.abs().max() < 10
    assert not far.grad[40:].any()


@every_power
@settings(max_examples=40)
@given(cloud=clouds(rows=2))
def test_a_measure_costs_nothing_against_itself(p, cloud):
    """Not even rounding."""
    x, weights = cloud
    assert not sinkhorn_divergence(x, x, weights, weights, p=p, blur=0).any()
