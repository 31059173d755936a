"""All entries of the kernel of p = 2 on a line, in batches."""

from __future__ import annotations

import numpy as np

from ..arrays import LARGEST, Array
from .kernel import null_diagonal

# What keeps Newton's matrix regular.
_SHIFT = 1e-12


class DenseEntries:
    """See `Entries`: between x (R, N) and y (R, M)."""

    farthest = 300.0

    def __init__(self, cost: Array) -> None:
        """Take costs (R, N, M) in units of epsilon."""
        self._cost = cost
        self._scaled = self.u = self.v = np.empty(0)

    @property
    def transposed(self) -> DenseEntries:
        """See `Entries`."""
        other = object.__new__(DenseEntries)
        other._cost = self._cost.swapaxes(1, 2)
        other.u, other.v = self.v, self.u
        other._scaled = self._scaled.swapaxes(1, 2) if self._scaled.size else self._scaled
        return other

    def scale(self, v: Array, log_b: Array) -> None:
        """See `Entries`."""
        self.v = v
        scaled = v[:, None, :] - self._cost
        entries = scaled + log_b[:, None, :]
        largest = np.maximum.reduce(entries, -1, keepdims=True)
        entries -= largest
        np.exp(entries, out=entries)
        self.u = -(np.log(np.add.reduce(entries, -1)) + largest[..., 0])
        scaled += self.u[:, :, None]
        self._scaled = np.exp(np.minimum(scaled, LARGEST, out=scaled), out=scaled)

    def times(self, vectors: Array) -> Array:
        """See `Entries`."""
        product: Array = self._scaled @ vectors
        return product

    def solve(self, left: Array, right: Array, roots: tuple[Array, Array], missed: Array) -> Array:
        """See `Entries`."""
        plan = self._scaled * left[:, :, None]
        plan *= right[:, None, :]
        turned = plan.swapaxes(1, 2)
        of_rows = null_diagonal((plan @ roots[1][:, :, None])[:, :, 0], roots[0])
        of_columns = null_diagonal((turned @ roots[0][:, :, None])[:, :, 0], roots[1])
        plan *= np.sqrt(1.0 / of_columns)[:, None, :]
        matrix = plan @ turned
        np.negative(matrix, out=matrix)
        places = np.arange(left.shape[-1])
        matrix[:, places, places] += of_rows + _SHIFT
        solved: Array = np.linalg.solve(matrix, missed[..., None])[..., 0]
        return solved


def squares(x: Array, y: Array, epsilon: float) -> Array:
    """Return the costs (R, N, M) between x (R, N) and y (R, M) in units of epsilon."""
    cost: Array = x[:, :, None] - y[:, None, :]
    cost *= cost
    cost *= 0.5 / epsilon
    return cost


def reduced_costs(x: Array, y: Array, crossing: Array, epsilon: float) -> Array:
    """Return what the optimal coupling's potentials leave of the costs, in units of epsilon.

    Along x the rest falls while the `crossings` lie below y and rises beyond, by the gap of x times
    the distance from y: summed away from its zero it is exact to its last digits, where a
    difference of costs and potentials is lost in their rounding at a small blur.
    """
    change = crossing[:, :, None] - y[:, None, :]
    change *= (x[:, 1:] - x[:, :-1])[:, :, None] / epsilon
    rest = np.zeros((*x.shape, y.shape[-1]))
    np.add.accumulate(np.maximum(change, 0.0), 1, out=rest[:, 1:])
    falling = np.maximum(-change, 0.0, out=change)
    rest[:, :-1] += np.add.accumulate(falling[:, ::-1], 1)[:, ::-1]
    return rest
