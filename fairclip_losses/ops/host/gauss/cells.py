"""Cells of a line inside which a plan is smooth, for p = 2.

Seen from a point y, the plan's density at x is ``exp((f(x) - x^2 / 2 + x y) / eps)`` but for a
factor: an analytic function of x that changes over a length of ``eps / sd(y | x)``. Where the mass
of x goes to two places alone, half to each, its singularities lie ``pi eps / (2 sd)`` off the line;
that is the worst case, and a polynomial of low degree stands for the density in a cell whose length
is a small multiple of ``eps / sd``.

The optimal transport map T tells sd before anything is solved: ``sd^2`` is near ``eps T'``, with
T' the length of the image over that of the cell. Both are taken of thrice the cell, as the blur
smooths T. Where T jumps over a gap, sd is half of the gap.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..arrays import Array
from ..newton import LEVEL
from .ragged import Ragged

# Most parts of a cell in one round: a few far points make the mean slope of a long cell a poor one.
_MOST_PARTS = 32


class Cells(NamedTuple):
    """Runs of points of all rows, in order and without any left out."""

    first: Array  # (C,)
    last: Array  # (C,)

    @property
    def sizes(self) -> Array:
        """Number of points of each cell, (C,)."""
        return self.last - self.first + 1

    def in_order(self) -> Cells:
        """Return the same cells from left to right, row by row."""
        order = self.first.argsort()
        return Cells(self.first[order], self.last[order])


def divide(own: Ragged, other: Ragged, epsilon: float, few: int, longest: float) -> Cells:
    """Return cells of ``own`` no longer than ``longest * eps / sd``, by the transport map.

    Cells of at most ``few`` points are left as they are.
    """
    jumps = np.append(np.diff(other.points), 0.0)
    jumps[other.ends - 1] = 0.0  # from one row to the next there is none
    last_of_row = other.ends - 1
    line, done = _Line(own), []
    todo = _between_ends(own)
    while todo.first.size:
        first, last = todo
        length = own.points[last] - own.points[first]
        row = own.row[first]
        low, high = line.between(row, own.points[first] - length, own.points[last] + length)
        start = np.where(low > own.starts[row], own.levels[low - 1], row)
        begin = other.levels.searchsorted(start + 8.0 * LEVEL, "right")
        end = other.levels.searchsorted(own.levels[high] - 8.0 * LEVEL)
        begin = np.clip(begin, other.starts[row], last_of_row[row])
        end = np.clip(end, begin, last_of_row[row])
        span = own.points[high] - own.points[low]
        share = length / np.where(span > 0.0, span, 1.0)
        pairs = np.stack([begin, end], -1).reshape(-1)
        jump = np.where(end > begin, np.maximum.reduceat(jumps, pairs)[::2], 0.0)
        image = share * (other.points[end] - other.points[begin])
        smooth = np.sqrt(length * image / epsilon) / longest
        short = np.maximum(smooth, 0.5 * jump * length / (longest * epsilon)) <= 1.0
        short |= last - first < few
        done.append((first[short], last[short]))
        parts = np.clip(np.ceil(smooth), 2, _MOST_PARTS).astype(int)
        todo = line.cut(Cells(first[~short], last[~short]), parts[~short])
    return Cells(*(np.concatenate(part) for part in zip(*done, strict=True))).in_order()


def _between_ends(own: Ragged) -> Cells:
    """Return a cell a row, but for its first and last point.

    Those stand for themselves, however light they are: a potential beyond the outermost of the
    points that stand for others would be foretold.
    """
    first = np.unique(np.concatenate([own.starts, own.starts + 1, own.ends - 1]))
    first = first[first < own.points.size]
    return Cells(first, np.append(first[1:], own.points.size) - 1)


def refine(own: Ragged, cells: Cells, ratio: Array) -> Cells:
    """Cut each cell into as many parts as its ratio to the longest one says."""
    return _Line(own).cut(cells, np.ceil(np.maximum(ratio, 1.0)).astype(int)).in_order()


class _Line:
    """The points of all rows as one line, on which places are searched."""

    def __init__(self, own: Ragged) -> None:
        self.own = own
        self.low = own.points[own.starts]
        length = own.points[own.ends - 1] - self.low
        some = length > 1e-300  # else its inverse is no number
        self.scale = np.where(some, 0.5 / np.where(some, length, 1.0), 0.0)
        self.keys = self._key(own.row, own.points)

    def _key(self, row: Array, place: Array) -> Array:
        keys: Array = row + np.clip((place - self.low[row]) * self.scale[row], 0.0, 0.5)
        return keys

    def between(self, row: Array, low: Array, high: Array) -> tuple[Array, Array]:
        """Return the first point at or above ``low`` and the last at or below ``high``."""
        first = self.keys.searchsorted(self._key(row, low))
        return first, self.keys.searchsorted(self._key(row, high), "right") - 1

    def cut(self, cells: Cells, parts: Array) -> Cells:
        """Cut cells into so many parts of equal length; those without points are left out."""
        which = np.repeat(np.arange(parts.size), parts)
        part = np.arange(which.size) - np.repeat(np.add.accumulate(parts) - parts, parts)
        first, last = cells.first[which], cells.last[which]
        low, high = self.own.points[first], self.own.points[last]
        place = low + (high - low) * (part / parts[which])
        begin = self.keys.searchsorted(self._key(self.own.row[first], place))
        begin = np.where(part == 0, first, np.clip(begin, first, last + 1))
        end = np.append(begin[1:], 0)
        end = np.where(part == parts[which] - 1, last + 1, end)
        there = end > begin
        found = Cells(begin[there], end[there] - 1)
        whole = (np.bincount(which[there], minlength=parts.size) == 1) & (parts > 1)
        if not whole.any():
            return found
        # points that lie nearer to each other than keys can tell are parted by their number
        middle = (cells.first + cells.last + 1) // 2
        kept = ~whole[which[there]]
        return Cells(
            np.concatenate([found.first[kept], cells.first[whole], middle[whole]]),
            np.concatenate([found.last[kept], middle[whole] - 1, cells.last[whole]]),
        )
