"""Those entries of the kernel of p = 2 on a line that a plan needs: a band around the coupling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.linalg import solveh_banded

from ..arrays import LARGEST, Array
from .kernel import null_diagonal
from .windows import windows

# Entries that are less than exp(-depth) of the largest are left out.
_DEPTH = 45.0
# Rounding of a potential in units of the largest cost: what keeps Newton's matrix regular is above
# it, and between these bounds.
_ROUNDING, _SHIFT = 5e-17, (1e-12, 1e-8)
# Entries that are looked at at once.
_BLOCK = 2**16
# Part of the roots of both weights below which an entry is left out of Newton's equations.
_NEGLIGIBLE = 1e-12


class BandEntries:
    """See `Entries`: between the ordered points x (1, N) and y (1, M) of one row."""

    farthest = 4.0

    def __init__(self, x: Array, y: Array, epsilon: float) -> None:
        self._x, self._y, self._epsilon = x[0], y[0], epsilon
        farthest = max(y.max() - x.min(), x.max() - y.min())
        self._shift = float(np.clip(_ROUNDING * farthest**2 / epsilon, *_SHIFT))
        self._scaled: Any = None  # a csr_array
        self.u = self.v = np.empty(0)

    @property
    def transposed(self) -> BandEntries:
        """See `Entries`."""
        other = object.__new__(BandEntries)
        other._x, other._y, other._epsilon = self._y, self._x, self._epsilon
        other._shift = self._shift
        other._scaled = None if self._scaled is None else self._scaled.T
        other.u, other.v = self.v, self.u
        return other

    def scale(self, v: Array, log_b: Array) -> None:
        """See `Entries`; every point of either side keeps what it needs."""
        x, y, epsilon = self._x, self._y, self._epsilon
        low, high = windows(x, y, epsilon * v[0], epsilon, _DEPTH)
        u = self._fill(low, high, v[0], log_b[0])
        first, last = windows(y, x, epsilon * u, epsilon, _DEPTH)
        first = np.minimum.accumulate(first[::-1])[::-1]
        rows = np.arange(x.size)
        low = np.minimum(low, np.maximum.accumulate(last).searchsorted(rows))
        high = np.maximum(high, first.searchsorted(rows, "right") - 1)
        self.u, self.v = self._fill(low, high, v[0], log_b[0])[None], v

    def _fill(self, low: Array, high: Array, v: Array, log_b: Array) -> Array:
        """Take the entries in windows; return u (N,)."""
        from scipy.sparse import csr_array  # here, since it adds a filter to Python's warnings

        self._scaled = None  # before there are others: the two are most of what is held
        count = high - low + 1
        ends = np.add.accumulate(count)
        starts = ends - count
        columns = np.arange(ends[-1], dtype=np.int32)
        columns += np.repeat((low - starts).astype(np.int32), count)
        entries = np.repeat(self._x, count)
        entries -= self._y[columns]
        entries *= entries
        entries *= -0.5 / self._epsilon
        entries += v[columns]
        weighted = log_b[columns]
        weighted += entries
        largest = np.maximum.reduceat(weighted, starts)
        weighted -= np.repeat(largest, count)
        np.exp(weighted, out=weighted)
        u: Array = -(np.log(np.add.reduceat(weighted, starts)) + largest)
        del weighted
        entries += np.repeat(u, count)
        np.exp(np.minimum(entries, LARGEST, out=entries), out=entries)
        rows = np.append(starts, ends[-1]).astype(np.int32)
        shape = (self._x.size, self._y.size)
        self._scaled = csr_array((entries, columns, rows), shape=shape)
        return u

    def times(self, vectors: Array) -> Array:
        """See `Entries`."""
        product: Array = (self._scaled @ vectors[0])[None]
        return product

    def solve(self, left: Array, right: Array, roots: tuple[Array, Array], missed: Array) -> Array:
        """See `Entries`.

        The equations are those of both sides' points, ``[[D_a, B], [B^T, D_b]]``, in the order in
        which the plan runs through them: a band.
        """
        scaled = self._scaled.tocsr()
        places = _places(scaled)
        size = sum(place.size for place in places)
        sums = [np.zeros(place.size) for place in places]
        width = 0
        for rows, columns, values in _plan(scaled, left, right):
            sums[0] += np.bincount(rows, values * roots[1][0, columns], sums[0].size)
            sums[1] += np.bincount(columns, values * roots[0][0, rows], sums[1].size)
            width = max(width, int(np.abs(places[0][rows] - places[1][columns]).max()))
        bands = np.zeros((size, width + 1))
        for rows, columns, values in _plan(scaled, left, right):
            row, column = places[0][rows], places[1][columns]
            bands[np.minimum(row, column), np.abs(row - column)] = values
        for place, own, total in zip(places, roots, sums, strict=True):
            bands[place, 0] = null_diagonal(total, own[0]) + self._shift
        side = np.zeros(size)
        side[places[0]] = missed[0]
        solved = solveh_banded(
            bands.T, side, lower=True, overwrite_ab=True, overwrite_b=True, check_finite=False
        )
        step: Array = solved[None, places[0]]
        return step


def _plan(scaled: Any, left: Array, right: Array) -> Iterator[tuple[Array, Array, Array]]:
    """Yield some entries of the plan at a time, with their places, but negligible ones."""
    ends = scaled.indptr
    rows = np.arange(ends.size - 1)
    for start in range(0, ends[-1], _BLOCK):
        some = slice(start, min(start + _BLOCK, ends[-1]))
        first, last = ends.searchsorted([some.start, some.stop - 1], "right") - 1
        count = np.minimum(ends[first + 1 : last + 2], some.stop)
        count -= np.maximum(ends[first : last + 1], some.start)
        row, column = np.repeat(rows[first : last + 1], count), scaled.indices[some]
        values = scaled.data[some] * left[0, row]
        values *= right[0, column]
        kept = values > _NEGLIGIBLE
        yield row[kept], column[kept], values[kept]


def _places(scaled: Any) -> tuple[Array, Array]:
    """Return each point's place among those of both sides."""
    middle = 0.5 * (scaled.indices[scaled.indptr[:-1]] + scaled.indices[scaled.indptr[1:] - 1])
    middle = np.maximum.accumulate(middle)
    rows, columns = np.arange(middle.size), np.arange(scaled.shape[1])
    return rows + middle.astype(int) + 1, columns + middle.searchsorted(columns)
