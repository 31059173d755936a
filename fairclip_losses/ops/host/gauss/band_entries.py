"""Those entries of the kernel of p = 2 on a line that a plan needs: a band around the coupling."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import solveh_banded

from ..arrays import Array
from .kernel import null_diagonal
from .windows import windows

# Entries that are less than exp(-depth) of the largest are left out.
_DEPTH = 45.0
# Rounding of a potential in units of the largest cost: what keeps Newton's matrix regular is above
# it, and between these bounds.
_ROUNDING, _SHIFT = 5e-17, (1e-12, 1e-8)
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
        ends = np.add.accumulate(high - low + 1)
        starts = np.concatenate([[0], ends])
        columns = np.arange(ends[-1]) + np.repeat(low - starts[:-1], high - low + 1)
        entries = np.repeat(self._x, high - low + 1) - self._y[columns]
        entries *= entries
        entries *= -0.5 / self._epsilon
        entries += v[columns]
        weighted = entries + log_b[columns]
        largest = np.maximum.reduceat(weighted, starts[:-1])
        weighted -= np.repeat(largest, high - low + 1)
        u: Array = -(np.log(np.add.reduceat(np.exp(weighted), starts[:-1])) + largest)
        entries += np.repeat(u, high - low + 1)
        np.exp(np.minimum(entries, 700.0, out=entries), out=entries)
        from scipy.sparse import csr_array  # here, since it adds a filter to Python's warnings

        shape = (self._x.size, self._y.size)
        self._scaled = csr_array((entries, columns, starts), shape=shape)
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
        plan = self._scaled.tocoo()
        rows, columns = plan.row, plan.col
        values = plan.data * left[0, rows]
        values *= right[0, columns]
        kept = values > _NEGLIGIBLE
        rows, columns, values = rows[kept], columns[kept], values[kept]
        row_place, column_place = self._places()
        row, column = row_place[rows], column_place[columns]
        below, beside = np.maximum(row, column), np.minimum(row, column)
        size = row_place.size + column_place.size
        bands = np.zeros((size, int((below - beside).max()) + 1))
        bands[beside, below - beside] = values
        for place, own, other, index, opposite in (
            (row_place, roots[0][0], roots[1][0], rows, columns),
            (column_place, roots[1][0], roots[0][0], columns, rows),
        ):
            times = np.bincount(index, values * other[opposite], own.size)
            bands[place, 0] = null_diagonal(times, own) + self._shift
        side = np.zeros(size)
        side[row_place] = missed[0]
        solved = solveh_banded(
            bands.T, side, lower=True, overwrite_ab=True, overwrite_b=True, check_finite=False
        )
        step: Array = solved[None, row_place]
        return step

    def _places(self) -> tuple[Array, Array]:
        """Return each point's place among those of both sides."""
        scaled = self._scaled.tocsr()
        middle = 0.5 * (scaled.indices[scaled.indptr[:-1]] + scaled.indices[scaled.indptr[1:] - 1])
        middle = np.maximum.accumulate(middle)
        rows, columns = np.arange(middle.size), np.arange(self._y.size)
        return rows + middle.astype(int) + 1, columns + middle.searchsorted(columns)
