"""Functions that are smooth in each cell, read at a few of its places and known at all points."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from ..arrays import Array
from .cells import Cells
from .ragged import Ragged


class Places(NamedTuple):
    """Where functions are to be read: Chebyshev's places of long cells, the points of others."""

    where: Ragged  # of no weight
    copied: Array  # (P,) whether a point is a place itself
    into: Array  # (T,) whether a place is a point
    cell: Array  # (P - copied,) the long cell of each other point
    u: Array  # (P - copied,) and its position in it, in [-1, 1]
    order: int

    @classmethod
    def of(cls, points: Ragged, cells: Cells, order: int) -> Places:
        """Return places from which polynomials of ``order`` coefficients a cell are known."""
        long = cells.sizes > order
        count = np.minimum(cells.sizes, order)
        end = np.add.accumulate(count)
        copied, into = np.repeat(~long, cells.sizes), np.repeat(~long, count)
        low, high = points.points[cells.first[long]], points.points[cells.last[long]]
        middle, half = 0.5 * (low + high), 0.5 * (high - low)
        where = np.empty(end[-1])
        where[into] = points.points[copied]
        roots, _ = _transform(order)
        where[~into] = (middle[:, None] + half[:, None] * roots).reshape(-1)
        cell = np.repeat(np.arange(middle.size), cells.sizes[long])
        u = (points.points[~copied] - middle[cell]) / half[cell]
        count = np.add.reduceat(count, cells.first.searchsorted(points.starts))
        return cls(Ragged(where, np.zeros_like(where), count), copied, into, cell, u, order)

    def fill(self, read: Sequence[Array]) -> list[Array]:
        """Return values (P,) at all points of functions that were read at the places (T,)."""
        _, transform = _transform(self.order)
        coefficients = [(r[~self.into].reshape(-1, self.order) @ transform) for r in read]
        found = []
        for values, coefficient in zip(read, coefficients, strict=True):
            full = np.empty(self.copied.size)
            full[self.copied] = values[self.into]
            full[~self.copied] = self._clenshaw(coefficient)
            found.append(full)
        return found

    def _clenshaw(self, coefficients: Array) -> Array:
        """Sum the Chebyshev series (C, order) of each point's cell."""
        by_degree = np.ascontiguousarray(coefficients.T)
        twice = 2.0 * self.u
        one, two = np.zeros_like(self.u), np.zeros_like(self.u)
        for k in range(self.order - 1, 0, -1):
            one, two = by_degree[k].take(self.cell) + twice * one - two, one
        summed: Array = by_degree[0].take(self.cell) + self.u * one - two
        return summed


@cache
def _transform(order: int) -> tuple[Array, Array]:
    """Return Chebyshev's places (order,) in [-1, 1] and the map of values there to coefficients."""
    angles = (np.arange(order) + 0.5) * (np.pi / order)
    matrix = 2.0 / order * np.cos(angles[:, None] * np.arange(order))
    matrix[:, 0] *= 0.5
    places = np.cos(angles)
    return places[::-1].copy(), matrix[::-1].copy()
