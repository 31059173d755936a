"""All entries of the kernel of p = 2 on a line, in batches."""

from __future__ import annotations

import numpy as np

from .arrays import Array
from .gauss import null_diagonal, shift


class DenseEntries:
    """See `Entries`: between x (R, N) and y (R, M)."""

    farthest = 300.0

    def __init__(self, x: Array, y: Array, epsilon: float) -> None:
        log = x[:, :, None] - y[:, None, :]
        log *= log
        log *= -0.5 / epsilon
        self._log = log
        self._shift = shift(x, y, epsilon)
        self._scaled = self.u = self.v = np.empty(0)

    @property
    def transposed(self) -> DenseEntries:
        """See `Entries`."""
        other = object.__new__(DenseEntries)
        other._log = self._log.swapaxes(1, 2)
        other._shift, other.u, other.v = self._shift, self.v, self.u
        other._scaled = self._scaled.swapaxes(1, 2) if self._scaled.size else self._scaled
        return other

    def scale(self, v: Array, log_b: Array) -> None:
        """See `Entries`."""
        self.v = v
        scaled = self._log + v[:, None, :]
        entries = scaled + log_b[:, None, :]
        largest = np.maximum.reduce(entries, -1, keepdims=True)
        entries -= largest
        np.exp(entries, out=entries)
        self.u = -(np.log(np.add.reduce(entries, -1)) + largest[..., 0])
        scaled += self.u[:, :, None]
        self._scaled = np.exp(np.minimum(scaled, 700.0, out=scaled), out=scaled)

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
        matrix[:, places, places] += of_rows + self._shift
        solved: Array = np.linalg.solve(matrix, missed[..., None])[..., 0]
        return solved
