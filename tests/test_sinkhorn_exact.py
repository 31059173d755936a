"""The exact cost in NumPy, by each of its ways: all points of every row, or those with weight."""

from __future__ import annotations

import math
from contextlib import contextmanager
from unittest import mock

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sinkhorn_cases import POWERS, clouds, float64, one_thread

from fairclip_losses.ops import sinkhorn_divergence
from fairclip_losses.ops.exact import solve_exact
from fairclip_losses.ops.host import solve_exact_on_host

every_way = pytest.mark.parametrize("few", [0, 2**16])


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with one_thread():
        yield


@contextmanager
def at_most(few):
    """Look at all points of every row up to ``few`` of them: at 0 only at those with weight."""
    host = "fairclip_losses.ops.host.exact"
    with (
        mock.patch.multiple(f"{host}.solve", FEW=few, FEW_STEPS=few),
        mock.patch(f"{host}.atoms.FEW", few),
    ):
        yield


@st.composite
def exact_problems(draw):
    """Draw points and weights (None, ragged, rows without mass) whose leading dims broadcast."""
    lead = draw(st.sampled_from([(), (3,), (2, 3)]))
    weights = st.one_of(st.just(0.0), st.floats(0.05, 1.0))

    def tensor(size, entries):
        shape = (*lead[draw(st.integers(0, len(lead))) :], size)
        count = math.prod(shape)
        return float64(draw(st.lists(entries, min_size=count, max_size=count))).view(shape)

    sizes = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    points = [tensor(size, st.floats(-3, 3))[..., None] for size in sizes]
    rows = [tensor(size, weights) if draw(st.booleans()) else None for size in sizes]
    if draw(st.booleans()):  # common points
        points[1] = points[0]
        rows[1] = tensor(sizes[0], weights)
    return *points, *rows


@pytest.mark.parametrize("p", POWERS)
@every_way
@settings(max_examples=60, deadline=None)
@given(problem=exact_problems())
def test_costs_are_those_of_the_device_path(p, few, problem):
    x, y, a, b = problem
    uniform = [torch.ones(t.shape[:-1], dtype=t.dtype) / t.shape[-2] for t in (x, y)]
    ones, others = (
        uniform[k] if w is None else w / w.sum(-1, keepdim=True) for k, w in enumerate((a, b))
    )
    truth = solve_exact(
        x[..., 0], y[..., 0], ones.nan_to_num(1.0), others.nan_to_num(1.0), p=p,
        same_points=False, potentials=False,
    )  # fmt: skip
    mass = [torch.tensor(True) if w is None else w.sum(-1) > 0 for w in (a, b)]
    has_mass = (mass[0] & mass[1]).expand(truth.cost.shape)
    with at_most(few):
        found = solve_exact_on_host(x, y, a, b, p=p, validate=True)
    cost = torch.from_numpy(found.cost)
    torch.testing.assert_close(cost, torch.where(has_mass, truth.cost, 0.0), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("p", POWERS)
@every_way
@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize("rows", [(), (4,), (2, 3)])
def test_gradients_are_those_of_the_device_path(p, few, common, rows):
    """Points that do not coincide have one gradient."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(33, 1, generator=draw, dtype=torch.float64)
    y = x if common else torch.randn(*rows[1:], 20, 1, generator=draw, dtype=torch.float64)
    b = torch.rand(*rows, y.shape[-2], generator=draw, dtype=torch.float64)
    b = b * (torch.rand(b.shape, generator=draw) < 0.3)
    b[..., 3] = 1.0
    grad = torch.rand(rows, generator=draw, dtype=torch.float64)
    truth = solve_exact(
        x[..., 0], y[..., 0], torch.full((33,), 1 / 33, dtype=torch.float64),
        b / b.sum(-1, keepdim=True), p=p, same_points=common, potentials=False,
    )  # fmt: skip
    with at_most(few):
        found = solve_exact_on_host(x, y, None, b, p=p, validate=True)
        by_x, by_y = (torch.from_numpy(slope) for slope in found.gradients(grad.numpy()))
    due = [(grad[..., None] * slope) for slope in (truth.grad_x, truth.grad_y) if slope is not None]
    want = sum(part.sum_to_size(33) for part in due) if common else due[0].sum_to_size(33)
    torch.testing.assert_close(by_x, want, rtol=1e-9, atol=1e-12)
    if not common:
        torch.testing.assert_close(by_y, due[1].sum_to_size(by_y.shape), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("p", POWERS)
@every_way
@settings(max_examples=60, deadline=None)
@given(batch=clouds(max_points=30, rows=3), seed=st.integers(0, 9))
def test_a_batch_and_its_groups_are_pots(p, few, batch, seed):
    """Cost and gradient of POT's autograd; ties moved apart, since it tears them as they come."""
    x, weights = batch
    n = len(x)
    x = x + 1e-3 * torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:, None]
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    points, mass = theirs.expand(n, 3), (weights / weights.sum(1, keepdim=True)).T
    expected = ot.wasserstein_1d(points, points, torch.full_like(mass, 1 / n), mass, p=p) / p
    with at_most(few):
        cost = sinkhorn_divergence(ours, ours, None, weights, p=p, blur=0)
        rows = torch.arange(1.0, 4.0, dtype=torch.float64)
        (rows * cost).sum().backward()
    (rows * expected).sum().backward()
    torch.testing.assert_close(cost, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@contextmanager
def in_torch():
    """As where the tensors do not lie on the CPU."""
    with mock.patch("fairclip_losses.ops.sinkhorn.suits_host", lambda *_: False):
        yield


@pytest.mark.parametrize("way", [at_most(0), at_most(2**16), in_torch()])
def test_tied_points_share_the_slope_of_p2(way):
    """Points that coincide are drawn towards one place, each by its own weight."""
    x = float64([0.0, 0.0, 0.0, 1.0, 2.0])[:, None].requires_grad_()
    y = float64([[[0.5], [3.0]], [[1.0], [1.0]]]).requires_grad_()
    a, b = float64([0.1, 0.3, 0.1, 0.25, 0.25]), float64([[0.4, 0.6], [0.25, 0.75]])
    with way:
        sinkhorn_divergence(x, y, a, b, blur=0).sum().backward()
    # To the rows of y the mass 0.5 at 0 moves on average by (0.4 * 0.5 + 0.1 * 3) / 0.5 and by 1.
    drawn = -0.5 - 0.5
    want = [drawn / 5, 3 * drawn / 5, drawn / 5, -0.25 * 2, -0.25 * 1 + 0.25 * 1]
    torch.testing.assert_close(x.grad[:, 0], float64(want))
    by_y = [[0.4 * 0.5, 0.1 * 3 + 0.25 * 2 + 0.25 * 1], [0.0625, 0.1875]]
    torch.testing.assert_close(y.grad[..., 0], float64(by_y))


@pytest.mark.parametrize("p", POWERS)
@settings(max_examples=60, deadline=None)
@given(cloud=clouds(rows=3))
def test_ties_are_shared_out_alike_everywhere(p, cloud):
    """Common points, of which many coincide, each row's weights against all rows' mean."""
    x, weights = cloud
    found = []
    for way in (at_most(2**16), in_torch()):
        points = x.clone().requires_grad_()
        with way:
            cost = sinkhorn_divergence(points, points, weights.mean(0), weights, p=p, blur=0)
            cost.sum().backward()
        found.append((cost.detach(), points.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("p", POWERS)
@every_way
def test_an_absent_point_far_away_finds_no_mass_of_rounding(p, few):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1, generator=draw, dtype=torch.float64)
    a, b = torch.rand(2, 40, generator=draw, dtype=torch.float64)
    far = torch.cat([x, float64([[9e99], [-9e98]])]).requires_grad_()
    among = [torch.nn.functional.pad(weights, (0, 2)) for weights in (a, b)]
    with at_most(few):
        alone = sinkhorn_divergence(x, x, a, b, p=p, blur=0)
        cost = sinkhorn_divergence(far, far, *among, p=p, blur=0)
        cost.backward()
    torch.testing.assert_close(cost, alone, rtol=1e-12, atol=0.0)
    assert far.grad.abs().max() < 10
    assert not far.grad[40:].any()


@pytest.mark.parametrize("p", POWERS)
@every_way
@settings(max_examples=40, deadline=None)
@given(cloud=clouds(rows=2))
def test_a_measure_costs_nothing_against_itself(p, few, cloud):
    """Not even rounding."""
    x, weights = cloud
    with at_most(few):
        assert not sinkhorn_divergence(x, x, weights, weights, p=p, blur=0).any()


@pytest.mark.parametrize("p", POWERS)
@every_way
def test_no_rows_at_all(p, few):
    x = torch.zeros(5, 1, requires_grad=True)
    with at_most(few):
        cost = sinkhorn_divergence(x, x, None, torch.zeros(0, 5), p=p, blur=0)
        cost.sum().backward()
    assert cost.shape == (0,)
    assert not x.grad.any()
