"""The Gibbs kernel of p = 2 on a line, and where its iteration starts.

Costs and potentials are in units of epsilon here. Products are sums of numbers, not of logs: the
entries ``exp(f_i + g_j - C_ij)`` are those of the first potentials, which the ones that follow
differ from by little. How they lie in memory is theirs to know: all of them (`DenseEntries`), or
those in windows (`BandEntries`).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..arrays import LARGEST, Array
from ..newton import LEVEL, Look, log_weights

# The least part of a point's mass in the diagonal of Newton's matrix.
_LEAST = 1e-3
# Products below, and above its inverse, have lost what they were the sum of.
_LEAST_NUMBER = 1e-200


class Entries(Protocol):
    """Entries ``exp(u_i + v_j - C_ij)`` of the kernel between x and y."""

    u: Array  # (R, N)
    v: Array  # (R, M)
    farthest: float  # change of a potential up to which they serve

    @property
    def transposed(self) -> Entries:
        """Those between y and x, which share the memory."""

    def scale(self, v: Array, log_b: Array) -> None:
        """Set v, and u so that the entries' sum in each row, weighted with b, is 1."""

    def times(self, vectors: Array) -> Array:
        """Multiply with vectors (R, M, k)."""

    def solve(self, left: Array, right: Array, roots: tuple[Array, Array], missed: Array) -> Array:
        """Solve ``(D_a - B D_b^-1 B^T) d = missed`` (R, N) for entries B, scaled on either side.

        The diagonals are those with which the roots of the weights, (R, N) and (R, M), are the
        null vectors: entries and diagonals agree beyond the rounding of the potentials. LinAlgError
        if there is no solution.
        """


def null_diagonal(times_roots: Array, roots: Array) -> Array:
    """Return ``(B roots') / roots``, and of points without weight 1."""
    there = roots > 0.0
    return np.where(there, np.maximum(times_roots / np.where(there, roots, 1.0), _LEAST), 1.0)


class GaussKernel:
    """The kernel between measures a on x (R, N) and b on y (R, M)."""

    epsilon = 1.0

    def __init__(self, a: Array, b: Array, entries: Entries) -> None:
        self.log_a, self.log_b = log_weights(a), log_weights(b)
        self._shared, self._turned = [entries], False

    @property
    def transposed(self) -> GaussKernel:
        """See `HostKernel.transposed`; shares the entries."""
        other = object.__new__(GaussKernel)
        other.log_a, other.log_b = self.log_b, self.log_a
        other._shared, other._turned = self._shared, not self._turned
        return other

    def log_product(self, exponent: Array) -> Array:
        """See `HostKernel.log_product`."""
        sums, u = self._sums(exponent)
        product = np.log(sums[..., 0])
        product -= u
        return product

    def moments(self, g: Array, y: Array) -> tuple[Array, Array]:
        """Return mean and deviation (R, N) of y (R, M) in the plan out of each x, at potentials g.

        ``x - mean`` is the gradient of the cost in x, per unit of its mass.
        """
        sums, _ = self._sums(self.log_b + g, y, y * y)
        mean = sums[..., 1] / sums[..., 0]
        square = sums[..., 2] / sums[..., 0]
        return mean, np.sqrt(np.maximum(square - mean * mean, 0.0))

    def steps(self, a: Array, b: Array, at: Look, damping: Array) -> Array:
        """See `HostKernel.steps`; equations scaled by the weights, so that they are symmetric."""
        roots = np.sqrt(a), np.sqrt(b)
        rho = np.exp(np.minimum(at.f - at.due, LARGEST))
        # sqrt(a_i b_j) exp(f_i + g_j - C_ij): of absent points nothing is left
        entries = self._entries(self.log_b + at.g)
        left, right = (
            np.exp(np.minimum(potential + 0.5 * logs - scale, LARGEST))
            for potential, logs, scale in (
                (at.f, self.log_a, entries.u),
                (at.g, self.log_b, entries.v),
            )
        )
        try:
            solved = entries.solve(left, right, roots, roots[0] * (1.0 - rho))
        except np.linalg.LinAlgError:  # not a number: a plain update instead
            plain: Array = 1.0 / np.maximum(rho, _LEAST_NUMBER) - 1.0
            return plain
        step: Array = np.where(a > 0, solved / np.where(a > 0, roots[0], 1.0), 0.0)
        return step

    def _entries(self, exponent: Array) -> Entries:
        """Return entries that serve for these exponents of y."""
        entries = self._shared[0].transposed if self._turned else self._shared[0]
        v = exponent - self.log_b
        if entries.v.size and np.maximum.reduce(np.abs(v - entries.v), None) <= entries.farthest:
            return entries
        return self._rescaled(exponent)

    def _rescaled(self, exponent: Array) -> Entries:
        entries = self._shared[0].transposed if self._turned else self._shared[0]
        entries.scale(exponent - self.log_b, self.log_b)
        self._shared[0] = entries.transposed if self._turned else entries
        return entries

    def _sums(self, exponent: Array, *values: Array) -> tuple[Array, Array]:
        """Return products with ``exp(exponent)``, and that times the values, over ``exp(-u)``."""
        entries = self._entries(exponent)
        sums = _times(entries, exponent, values)
        total = sums[..., 0]
        least, most = np.minimum.reduce(total, None), np.maximum.reduce(total, None)
        if not (least > _LEAST_NUMBER and most < 1.0 / _LEAST_NUMBER):  # or none is a number
            entries = self._rescaled(exponent)
            sums = _times(entries, exponent, values)
        return sums, entries.u


def _times(entries: Entries, exponent: Array, values: tuple[Array, ...]) -> Array:
    weight = np.exp(np.minimum(exponent - entries.v, LARGEST))
    if not values:
        return entries.times(weight[:, :, None])
    return entries.times(np.stack([weight, *(weight * value for value in values)], -1))


def crossings(x: Array, y: Array, a: Array, b: Array) -> Array:
    """Return where the optimal coupling goes over from each point of x to the next, (R, N - 1).

    That is the point of y (R, M) that holds the level between them; between two such, their middle.
    """
    levels = np.add.accumulate(a, -1)[:, :-1]
    others = np.add.accumulate(b, -1)
    last = y.shape[-1] - 1
    found = np.empty_like(levels)
    for row, (level, other, place) in enumerate(zip(levels, others, y, strict=True)):
        before = np.minimum(other.searchsorted(level - LEVEL), last)
        after = np.minimum(other.searchsorted(level + LEVEL, "right"), last)
        found[row] = 0.5 * (place[before] + place[after])
    return found


def kantorovich(x: Array, crossing: Array) -> Array:
    """Return the potential of the optimal coupling at x (R, N), 0 at the first point."""
    f = np.zeros_like(x)
    slope = 0.5 * (x[:, 1:] + x[:, :-1]) - crossing
    np.add.accumulate((x[:, 1:] - x[:, :-1]) * slope, -1, out=f[:, 1:])
    return f
