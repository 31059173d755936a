"""Fewer points of a line, for what is smooth on the scale of epsilon.

The unknowns of Newton's equations are products with the kernel: between two points less than a part
of epsilon apart they are straight to second order in that part. So the equations are solved on some
of the points and interpolated; what that leaves of the error, the next round takes.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array

# Distance of the nodes in units of epsilon.
_SPACING = 0.1
# All points are nodes where so few are left out, or there are so few in all.
_MOST, _FEW = 0.5, 128
# Shortest gap, in units of epsilon, in the kernel's inverse, which has no finite entry at 0.
_SHORTEST = 1e-7


class Nodes:
    """J of the points t (K,) of a line in units of epsilon.

    ``coupling`` (J - 1,) is the log of less the entries of the kernel's inverse between neighbours.
    """

    def __init__(self, t: Array) -> None:
        cell = np.floor(t / _SPACING)
        first = np.ones(t.size, dtype=bool)
        np.not_equal(cell[1:], cell[:-1], out=first[1:])
        # both ends of a long gap, across which nothing is straight, and of the line
        first[:-1] |= t[1:] - t[:-1] > _SPACING
        first[-1] = True
        places = np.flatnonzero(first)
        self._is_all = t.size <= _FEW or places.size > _MOST * t.size
        self._places = np.arange(t.size) if self._is_all else places
        self.size = self._places.size
        gap = np.diff(t[self._places])
        widened = np.maximum(gap, _SHORTEST)
        self.coupling = -widened - np.log(-np.expm1(-2.0 * widened))
        if not self._is_all:
            self._counts = np.diff(places, append=t.size)
            self._part = t - np.repeat(t[places], self._counts)
            self._part /= np.repeat(np.append(gap, 1.0), self._counts)

    def at(self, values: Array) -> Array:
        """Read values (*, K) at the nodes: (*, J)."""
        return values if self._is_all else values.take(self._places, -1)

    def gather(self, masses: Array) -> Array:
        """Divide masses (R, K) between the nodes on either side: (R, J)."""
        if self._is_all:
            return masses
        after = masses * self._part
        gathered: Array = np.add.reduceat(masses - after, self._places, -1)
        gathered[:, 1:] += np.add.reduceat(after, self._places, -1)[:, :-1]
        return gathered

    def spread(self, values: Array) -> Array:
        """Interpolate values (R, J) at the nodes: (R, K)."""
        if self._is_all:
            return values
        spread = np.repeat(np.diff(values, append=0.0), self._counts, -1)
        spread *= self._part
        spread += np.repeat(values, self._counts, -1)
        return spread
