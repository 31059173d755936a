"""Fewer points that stand for all of a side's, and the way back to all of them."""

from __future__ import annotations

import numpy as np

from ..arrays import Array
from .cells import divide, refine
from .chebyshev import Places
from .problem import Side, read
from .quadrature import compress
from .ragged import Ragged

# Points that stand for a cell.
_ORDER = 8
# Part of the error allowed that cells are laid out for.
_PART = 0.1
# Points a row up to which dividing them costs more than it saves.
_FEW = 64


class FewerPoints:
    """What stands for measures while the potentials between them and others are sought.

    Of what a cell of ``h = k eps / sd`` adds to the marginals' L1 error, ``r^-2q`` bounds the part,
    with q points a cell and r the radius of the ellipse around it on which the nearest singularity
    may lie, ``r - 1 / r = 2 pi / k``.
    """

    def __init__(self, own: Ragged, image: Ragged, epsilon: float, tol: float) -> None:
        self._own, self._epsilon = own, epsilon
        radius = min(_PART * tol, 0.01) ** (-0.5 / _ORDER)
        self._longest = 2.0 * np.pi / (radius - 1.0 / radius)
        self.light, self._cells = own, None
        if own.count.max() > _FEW:
            self._cells = divide(own, image, epsilon, _ORDER, self._longest)
            self.light = compress(own, self._cells, _ORDER)

    def judge(self, sd: Array) -> tuple[float, Array]:
        """Return the most that any row's cells add to the error, and each cell's relative length.

        sd, of where the mass of the points goes, is the plan's; the length of a cell is in units of
        the longest allowed. Cells that were left as they are add nothing, and their length is 0.
        """
        cells = self._cells
        if cells is None:
            return 0.0, np.zeros(0)
        count = np.minimum(cells.sizes, _ORDER)
        starts = np.add.accumulate(count) - count
        length = self._own.points[cells.last] - self._own.points[cells.first]
        k = length * np.maximum.reduceat(sd, starts) / self._epsilon
        k[cells.sizes <= _ORDER] = 0.0
        pole = np.pi / np.maximum(k, 1e-6)
        part = (pole + np.sqrt(pole * pole + 1.0)) ** (-2.0 * _ORDER)
        part *= np.add.reduceat(self.light.weights, starts)
        rows = np.add.reduceat(part, starts.searchsorted(self.light.starts))
        return float(rows.max()), k / self._longest

    def refine(self, ratio: Array) -> None:
        """Cut cells that are longer than the plan allows."""
        if self._cells is not None:
            self._cells = refine(self._own, self._cells, ratio)
            self.light = compress(self._own, self._cells, _ORDER)

    def read(self, side: Side, other: Ragged, g: Array) -> tuple[Array, Array]:
        """Return the potential and the pull at all points of a solved side.

        g is the potential of the others, of which those are the soft minimum.
        """
        if self.light is self._own or self._cells is None:
            return side.potential, side.pull
        places = Places.of(self._own, self._cells, 2 * _ORDER)
        least, pull = places.fill(read(places.where, other, g, self._epsilon))
        return least, pull
