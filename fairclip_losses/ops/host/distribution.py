"""W_1 as the area between two distribution functions, every row at every point."""

from __future__ import annotations

import numpy as np

from .arrays import Array, HostSolution, along, stretch, sum_to
from .inputs import Weights, both_have_mass


def solve_by_distribution_functions(x: Array, y: Array, a: Weights, b: Weights) -> HostSolution:
    """W_1 = integral |A - B| over the points of both; A and B the cumulative weights."""
    n = x.shape[-1]
    surplus = _normalised(a, n)
    if y is x:
        points = x
        surplus = surplus - _normalised(b, n)
        full = a.full or b.full
    else:
        lead = np.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        points = np.concatenate([stretch(x, lead), stretch(y, lead)], -1)
        due = _normalised(b, y.shape[-1])
        lead = np.broadcast_shapes(surplus.shape[:-1], due.shape[:-1])
        surplus = np.concatenate([stretch(surplus, lead), -stretch(due, lead)], -1)
        full = a.full and b.full
    lead = np.broadcast_shapes(points.shape[:-1], surplus.shape[:-1])
    has_mass = both_have_mass(a, b, lead)
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
    cost = np.add.reduce(area * gap, -1) * has_mass
    tied = gap.size > 0 and np.minimum.reduce(gap, axis=None) == 0

    def gradients(grad: Array) -> tuple[Array, Array]:
        grad = grad * has_mass
        if tied:
            slopes = _tied_slopes(levels, ordered, gap) * grad[..., None]
        else:
            pulled = area * grad[..., None] if points.ndim > 1 else _weighted(grad, area)
            edge = np.zeros((*pulled.shape[:-1], 1))
            slopes = np.concatenate([edge, pulled], -1) - np.concatenate([pulled, edge], -1)
        slopes = sum_to(slopes, points.shape)
        if there is not None:
            slopes = slopes * along(there, order)
        found = np.empty_like(slopes)
        np.put_along_axis(found, order, slopes, -1)
        if y is x:
            return found, found
        return sum_to(found[..., :n], x.shape), sum_to(found[..., n:], y.shape)

    return HostSolution(np.array(np.broadcast_to(cost, lead)), gradients)


def _normalised(weights: Weights, count: int) -> Array:
    if weights.values is None:
        return np.full(count, 1.0 / count)
    normalised: Array = weights.values * weights.scale[..., None]
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


def _weighted(grad: Array, rows: Array) -> Array:
    """Return the sum of all rows (*, K), each times its gradient (*,): (K,)."""
    grad = np.broadcast_to(grad, rows.shape[:-1])
    summed: Array = grad.reshape(-1) @ rows.reshape(grad.size, rows.shape[-1])
    return summed
