"""The exact cost for p = 2 by the optimal coupling itself, for problems of few points.

The levels of both measures, that is their cumulative weights, cut (0, 1] into N + M steps a row.
Over a step one point of x lies opposite one of y, and its length is the mass that they exchange.
It takes few calls and no difference of long sums; where there are many steps `quantiles.py` is
faster, which walks along the points of one side only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .arrays import Array, HostSolution, Shape, along, stretch
from .atoms import even_out
from .inputs import Weights, both_have_mass


def solve_by_merged_levels(x: Array, y: Array, a: Weights, b: Weights, lead: Shape) -> HostSolution:
    """W_2^2 / 2 = 1/2 sum_k mass_k (x_i(k) - y_j(k))^2 over the steps k of a row."""
    n, m = x.shape[-1], y.shape[-1]
    order_x = x.argsort(-1)
    order_y = order_x if y is x else y.argsort(-1)
    levels = np.empty((*lead, n + m))
    levels[..., :n] = _levels(a, order_x)
    levels[..., n:] = _levels(b, order_y)
    levels = levels.reshape(-1, n + m)
    merged = levels.argsort(-1, kind="stable")  # finds the two runs and merges them
    of_x = merged < n
    merged += np.arange(0, levels.size, n + m)[:, None]
    mass = levels.take(merged)
    mass[:, 1:] -= mass[:, :-1]
    # A step ends at a level: where the levels passed before it stand, it begins.
    passed = np.add.accumulate(of_x, -1)
    passed -= of_x
    side_x = _find_side(x, order_x, passed, lead)
    side_y = _find_side(y, order_y, np.arange(n + m) - passed, lead)
    shift = x.take(side_x.at)
    shift -= y.take(side_y.at)
    pull = mass * shift
    shift *= pull
    has_mass = both_have_mass(a, b, lead)
    cost = np.asarray(0.5 * np.add.reduce(shift, -1).reshape(lead) * has_mass)

    def gradients(grad: Array) -> tuple[Array, Array]:
        pulled = pull * (grad * has_mass).reshape(-1, 1)
        to_x, to_y = side_x.collect(pulled, mass), side_y.collect(pulled, mass)
        return (to_x - to_y if y is x else to_x), -to_y

    return HostSolution(cost, gradients)


def _levels(weights: Weights, order: Array) -> Array:
    """Return the cumulative weights of sorted points, (*, N); each row ends at 1 exactly.

    So does no step of rounding's mass lie between the ends of the two measures.
    """
    if weights.values is None:
        n = order.shape[-1]
        return np.arange(1, n + 1) / n
    levels = np.add.accumulate(along(weights.values, order), -1, dtype=np.float64)
    total = levels[..., -1:]
    if not weights.complete:  # no measure: any will do
        return np.where(total > 0, levels / total, 1.0)
    levels /= total
    return levels


class _Side(NamedTuple):
    """The points of one measure and which of them is at each step."""

    points: Array  # (*, N)
    at: Array  # (R, K) among the flattened points
    tied: bool  # whether points of a row coincide

    def collect(self, slopes: Array, mass: Array) -> Array:
        """Return for every point the sum of its steps' slopes, (*, N)."""
        if self.tied:
            row = np.repeat(np.arange(mass.shape[0]), mass.shape[1])
            values = self.points.take(self.at).reshape(-1)
            slopes = even_out(slopes.reshape(-1), mass.reshape(-1), values, row)
        found = np.bincount(self.at.reshape(-1), slopes.reshape(-1), self.points.size)
        return found.reshape(self.points.shape)


def _find_side(points: Array, order: Array, place: Array, lead: Shape) -> _Side:
    """Look up which points stand at ``place`` (R, K) of their sorted rows."""
    if points.ndim == 1:  # a step at the end, without mass, may lie behind the last point
        at = order.take(place, mode="clip")
        ordered = points.take(order)
    else:
        n = points.shape[-1]
        order = order + np.arange(0, points.size, n).reshape(*points.shape[:-1], 1)
        source = stretch(order, lead).reshape(-1, n)
        place = np.minimum(place, n - 1) + np.arange(0, source.size, n)[:, None]
        at = source.take(place)
        ordered = points.take(order)
    return _Side(points, at, bool((ordered[..., 1:] == ordered[..., :-1]).any()))
