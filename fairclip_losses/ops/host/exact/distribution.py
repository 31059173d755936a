"""W_1 as the area between two distribution functions, every row at every point."""

from __future__ import annotations

import numpy as np

from ..arrays import Array, HostSolution, Shape, along, starts, stretch, sum_to
from .inputs import Weights, both_have_mass


def solve_by_distribution_functions(
    x: Array, y: Array, a: Weights, b: Weights, lead: Shape
) -> HostSolution:
    """W_1 = integral |A - B| over the points of both; A and B the cumulative weights."""
    n = x.shape[-1]
    surplus, due = _normalised(a, n), _normalised(b, y.shape[-1])
    if y is x:
        points = x
        surplus = surplus - due
        full = a.full or b.full
    else:
        both = np.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        points = np.concatenate([stretch(x, both), stretch(y, both)], -1)
        both = np.broadcast_shapes(surplus.shape[:-1], due.shape[:-1])
        surplus = np.concatenate([stretch(surplus, both), -stretch(due, both)], -1)
        full = a.full and b.full
    if not (a.complete and b.complete):
        surplus = surplus * both_have_mass(a, b, lead)[..., None]
    there = None
    if not full:  # an absent point waits among the others: far away it would find rounding's mass
        there = sum_to(np.array(stretch(surplus != 0, lead), np.float64), points.shape) > 0
        middle = np.where(there, points, 0.0).sum() / max(there.sum(), 1)
        points = np.where(there, points, middle)
    order = points.argsort(-1)
    z = along(points, order)
    gap = z[..., 1:] - z[..., :-1]
    ordered = along(surplus, order)
    levels = np.add.accumulate(ordered[..., :-1], -1)
    area = np.abs(levels)
    # Row by row: a matrix product would round a row by how many there are.
    cost = np.asarray(np.add.reduce(area * gap, -1))
    tied = gap.size > 0 and np.minimum.reduce(gap, axis=None) == 0

    def gradients(grad: Array) -> tuple[Array, Array]:
        if tied:
            slopes = sum_to(_tied_slopes(levels, ordered, gap) * grad[..., None], points.shape)
        else:
            slopes = np.zeros(points.shape)
            pulled = _pulled(grad, area, gap.shape)
            slopes[..., 1:] = pulled
            slopes[..., :-1] -= pulled
        if there is not None:
            slopes *= along(there, order)
        found = np.empty_like(slopes)
        found.put(order if order.ndim == 1 else order + starts(order), slopes)
        if y is x:
            return found, found
        return sum_to(found[..., :n], x.shape), sum_to(found[..., n:], y.shape)

    return HostSolution(cost, gradients)


def _normalised(weights: Weights, count: int) -> Array:
    if weights.values is None:
        return np.full(count, 1.0 / count)
    normalised: Array = weights.values * weights.scale()[..., None]
    return normalised


def _tied_slopes(levels: Array, surplus: Array, gap: Array) -> Array:
    """Return the slopes of rows some of whose points coincide, (*, K).

    A run of coinciding points has one slope, of which each takes its own part of ``a - b``: the
    order in which the sort put them plays no part, so a collapsed batch is not torn apart.
    """
    edge = np.zeros((*levels.shape[:-1], 1))
    outer = np.concatenate([edge, levels, edge], -1)
    places = np.arange(gap.shape[-1] + 1)
    apart = gap > 0
    rim = np.ones((*gap.shape[:-1], 1), dtype=bool)
    first = np.where(np.concatenate([rim, apart], -1), places, 0)
    last = np.where(np.concatenate([apart, rim], -1), places, places[-1])
    first = np.maximum.accumulate(first, -1)
    last = np.minimum.accumulate(last[..., ::-1], -1)[..., ::-1]
    left, right = along(outer, first), along(outer, last + 1)
    rise = right - left
    flat = rise == 0
    ratio = np.where(
        flat, -np.sign(left), (np.abs(left) - np.abs(right)) / np.where(flat, 1.0, rise)
    )
    return surplus * ratio


def _pulled(grad: Array, area: Array, shape: Shape) -> Array:
    """Return the sum of all rows (*, K), each times its gradient (*,), over what broadcast."""
    if len(shape) > 1:
        return sum_to(area * grad[..., None], shape)
    pulled: Array = grad.reshape(-1) @ area.reshape(grad.size, area.shape[-1])
    return pulled
