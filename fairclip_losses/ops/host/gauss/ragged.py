"""Rows of points of their own, of different numbers: one array after the other, or a table."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..arrays import Array


class Ragged:
    """Measures of sum one, a row each; a row's points are distinct and in order."""

    def __init__(self, points: Array, weights: Array, count: Array) -> None:
        self.points, self.weights = points, weights  # (P,)
        self.count = count  # (R,) points of each row
        self.ends = np.add.accumulate(count)
        self.starts = self.ends - count

    @classmethod
    def join(cls, parts: list[Ragged]) -> Ragged:
        """Put the rows of one after those of the other."""
        return cls(
            np.concatenate([part.points for part in parts]),
            np.concatenate([part.weights for part in parts]),
            np.concatenate([part.count for part in parts]),
        )

    @cached_property
    def row(self) -> Array:
        """The row of each point, (P,)."""
        return np.repeat(np.arange(self.count.size), self.count)

    @cached_property
    def levels(self) -> Array:
        """The row plus the weight up to each point and with it, (P,)."""
        levels = np.add.accumulate(self.weights)
        before = np.concatenate([[0.0], levels])[self.starts]
        levels += np.repeat(np.arange(self.count.size) - before, self.count)
        found: Array = levels
        return found

    def table(self, rows: Array) -> Table:
        """Return some rows as a table."""
        count = self.count[rows][:, None]
        columns = np.arange(int(np.maximum.reduce(count, None)))
        there = columns < count
        place = np.minimum(columns, count - 1)
        place += self.starts[rows, None]
        weights = np.where(there, self.weights[place], 0.0)
        return Table(self.points[place], weights, place, there)


class Table(NamedTuple):
    """Rows (R, n) that are filled up with their last point, of no weight."""

    points: Array
    weights: Array
    place: Array  # of each in the array of all rows
    there: Array  # whether it is none that fills up

    def put(self, values: Array, into: Array) -> None:
        """Write values (R, n) to the array of all rows."""
        into[self.place[self.there]] = values[self.there]


class Ordered(NamedTuple):
    """Points (1 or R, N) in order, and where each comes from."""

    points: Array
    place: Array

    @classmethod
    def of(cls, points: Array) -> Ordered:
        """Sort points (1 or R, N)."""
        place = points.argsort(-1)
        return cls(np.take_along_axis(points, place, -1), place)

    def rows(self, rows: slice) -> Ordered:
        """Return some rows."""
        return self if len(self.points) == 1 else Ordered(self.points[rows], self.place[rows])


class Cloud:
    """Points in any order, with ties, of which each row of weights (R, N) has some."""

    def __init__(self, points: Ordered, weights: Array) -> None:
        count, size = max(len(weights), len(points.points)), weights.shape[-1]
        if len(points.place) == 1:
            rows = weights.take(points.place[0], -1)
        else:
            rows = np.take_along_axis(np.broadcast_to(weights, (count, size)), points.place, -1)
        self._points = np.broadcast_to(points.points, rows.shape)
        self._place = points.place + np.arange(count)[:, None] * size
        self._there = rows > 0
        self.present, self._of = self._merged(rows, self._there)

    def _merged(self, weights: Array, kept: Array) -> tuple[Ragged, Array]:
        """Return the distinct points of each row, and which of them each kept point is."""
        points, weights = self._points[kept], weights[kept]
        count = np.count_nonzero(kept, -1)
        starts = np.add.accumulate(count) - count
        new = np.ones(points.size, bool)
        np.not_equal(points[1:], points[:-1], out=new[1:])
        new[starts[count > 0]] = True
        if new.all():
            return Ragged(points, weights, count), np.arange(points.size)
        which = np.add.accumulate(new) - 1
        first = np.flatnonzero(new)
        row = np.repeat(np.arange(count.size), count)
        fewer = np.bincount(row[first], minlength=count.size)
        return Ragged(points[first], np.add.reduceat(weights, first), fewer), which

    @cached_property
    def absent(self) -> Ragged:
        """The points without weight, as points."""
        return self._absent[0]

    @cached_property
    def _absent(self) -> tuple[Ragged, Array]:
        return self._merged(np.zeros(self._points.shape), ~self._there)

    def take(self, values: Array) -> Array:
        """Read values (R, N) at the distinct points."""
        full = values.reshape(-1)[self._place[self._there]]
        taken = np.empty_like(self.present.points)
        taken[self._of] = full
        return taken

    def spread(self, present: Array, absent: Array | None = None) -> Array:
        """Put values of the distinct points in the order of the points, (R, N), nothing is 0."""
        full = np.zeros(self._place.size)
        full[self._place[self._there]] = present[self._of]
        if absent is not None:
            full[self._place[~self._there]] = absent[self._absent[1]]
        return full.reshape(self._place.shape)
