"""The Gibbs kernel of p = 1 on a line, ``exp(-|z_i - z_j| / eps)``, by running sums in NumPy.

To the left of a point the kernel is ``exp(z_j / eps) exp(-z_i / eps)``, to the right the reverse.
While those factors are numbers, products with the kernel are two running sums and nothing is lost:
all terms are positive. Beyond, the sums run in the log domain.

The inverse of this kernel is tridiagonal (the process with this covariance is Markov), which is
what makes Newton's equations banded.
"""

from __future__ import annotations

import numpy as np

from .arrays import Array
from .laplace_newton import Inverse, newton_steps
from .newton import LEVEL, LOG_ZERO, Look

# Longest line, in units of epsilon, whose factors are numbers: a potential adds as much again.
_LONGEST = 400.0


class LaplaceKernel:
    """The kernel on sorted distinct points z (K,)."""

    def __init__(self, z: Array, epsilon: float) -> None:
        self.epsilon = epsilon
        self.t = (z - z[0]) / epsilon
        self._inverse = Inverse.of(self.t)
        self._grow: Array | None = None
        if self.t[-1] <= _LONGEST:
            self._grow = np.exp(self.t - 0.5 * self.t[-1])
            self._fade = 1.0 / self._grow

    @property
    def transposed(self) -> LaplaceKernel:
        """See `HostKernel.transposed`."""
        return self

    def log_product(self, exponent: Array) -> Array:
        """See `HostKernel.log_product`."""
        if self._grow is None:
            left, right = self._log_sums(exponent)
            return np.logaddexp(left[..., :-1], right[..., :-1])
        largest, weight, left, right = self._sums(exponent)
        left += right
        left -= weight
        np.log(left, out=left)
        left += largest
        return left

    def pull(self, exponent: Array) -> Array:
        """``sum_j P(j | i) dc(z_i, z_j) / dz_i``, (R, K); a point does not pull at itself."""
        if self._grow is None:
            left, right = self._log_sums(exponent)
            whole = np.logaddexp(left[..., :-1], right[..., :-1])
            # what lies strictly on either side, moved by one gap
            gap = self.t[1:] - self.t[:-1]
            pulled = np.zeros_like(whole)
            pulled[..., 1:] += np.exp(left[..., :-2] - gap - whole[..., 1:])
            pulled[..., :-1] -= np.exp(right[..., :-2] - whole[..., :-1])
            return pulled
        _, weight, left, right = self._sums(exponent)
        pulled = left - right
        left += right
        left -= weight
        pulled /= left
        return pulled

    def steps(self, a: Array, b: Array, at: Look) -> Array:
        """See `HostKernel.steps`: banded equations."""
        return newton_steps(self._inverse, a, b, at, self.epsilon)

    def _sums(self, exponent: Array) -> tuple[Array, Array, Array, Array]:
        """Return a scale (log), the weights, and their running sums from both ends."""
        largest = np.maximum.reduce(exponent, -1, keepdims=True)
        weight = np.exp(exponent - largest)
        left = weight * self._grow
        np.add.accumulate(left, -1, out=left)
        left *= self._fade
        right = weight * self._fade
        right = np.add.accumulate(right[..., ::-1], -1)[..., ::-1]
        right *= self._grow
        return largest, weight, left, right

    def _log_sums(self, exponent: Array) -> tuple[Array, Array]:
        """Return logs of the sums up to i and of those beyond i, (R, K + 1), the last unused."""
        shape = (*exponent.shape[:-1], exponent.shape[-1] + 1)
        left, right = np.full(shape, LOG_ZERO), np.full(shape, LOG_ZERO)
        up = np.logaddexp.accumulate(exponent + self.t, -1)
        left[..., :-1] = up - self.t
        down = np.logaddexp.accumulate((exponent - self.t)[..., ::-1], -1)[..., ::-1]
        right[..., :-2] = down[..., 1:] + self.t[:-1]
        return left, right


def linear_start(z: Array, a: Array, b: Array) -> Array:
    """Return a Kantorovich potential of a (R, K), level where the plan leaves it free."""
    surplus = a - b
    levels = np.add.accumulate(surplus[:, :-1], -1)
    slope = np.sign(levels) * (np.abs(levels) > LEVEL) * (z[:-1] - z[1:])
    f = np.zeros_like(surplus)
    np.add.accumulate(slope, -1, out=f[:, 1:])
    return f
