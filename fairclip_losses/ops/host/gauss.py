"""The Gibbs kernel of p = 2 on a line with all its entries in memory, for batches."""

from __future__ import annotations

import numpy as np

from .arrays import Array
from .newton import LEVEL, Look, log_weights

# Most entries of all rows: beyond, fewer points stand for all.
MOST_ENTRIES = 2**20
# What keeps Newton's matrix regular, and the least part of a point's mass in its diagonal.
_JITTER, _LEAST = 1e-12, 1e-3


class GaussKernel:
    """The kernel ``exp(-|x_i - y_j|^2 / 2 eps)`` between x (1 or R, N) and y (1 or R, M)."""

    def __init__(self, x: Array, y: Array, epsilon: float) -> None:
        self.x, self.y, self.epsilon = x, y, epsilon
        shift = x[:, :, None] - y[:, None, :]
        self._log = shift * shift
        self._log *= -0.5 / epsilon

    @property
    def transposed(self) -> GaussKernel:
        """See `HostKernel.transposed`; shares the entries."""
        other = object.__new__(GaussKernel)
        other.x, other.y, other.epsilon = self.y, self.x, self.epsilon
        other._log = self._log.transpose(0, 2, 1)
        return other

    def log_product(self, exponent: Array) -> Array:
        """See `HostKernel.log_product`."""
        largest, entries = self._entries(exponent)
        product = np.add.reduce(entries, -1)
        np.log(product, out=product)
        product += largest[..., 0]
        found: Array = product
        return found

    def pull(self, exponent: Array) -> Array:
        """See `HostKernel.pull`."""
        _, entries = self._entries(exponent)
        reached = (entries @ self.y[:, :, None])[..., 0]
        pulled: Array = self.x - reached / np.add.reduce(entries, -1)
        return pulled

    def steps(self, a: Array, b: Array, at: Look) -> Array:
        """See `HostKernel.steps`; equations scaled by the weights, so that they are symmetric."""
        epsilon = self.epsilon
        there = a > 0
        root = np.sqrt(a)
        rho = np.exp(np.minimum((at.f - at.due) / epsilon, 700.0))
        # sqrt(a_i b_j) exp((f_i + g_j - C_ij) / eps): of absent points nothing is left
        plan = self._log + (at.g / epsilon + 0.5 * log_weights(b))[:, None, :]
        plan += (at.f / epsilon + 0.5 * log_weights(a))[:, :, None]
        np.exp(np.minimum(plan, 700.0, out=plan), out=plan)
        matrix = plan @ plan.transpose(0, 2, 1)
        # constants are the null space: the outer product of the null vector fills it
        np.subtract(root[:, :, None] * root[:, None, :], matrix, out=matrix)
        places = np.arange(self.x.shape[-1])
        matrix[:, places, places] += np.maximum(np.where(there, rho, 1.0), _LEAST) + _JITTER
        try:
            scaled = np.linalg.solve(matrix, (root * (1.0 - rho))[..., None])[..., 0]
        except np.linalg.LinAlgError:  # not a number: a plain update instead
            return 1.0 / rho - 1.0
        step: Array = np.where(there, scaled / np.where(there, root, 1.0), 0.0)
        return step

    def _entries(self, exponent: Array) -> tuple[Array, Array]:
        entries = exponent[:, None, :] + self._log
        largest = np.maximum.reduce(entries, -1, keepdims=True)
        entries -= largest
        np.exp(entries, out=entries)
        return largest, entries


def quadratic_start(z: Array, a: Array, b: Array) -> Array:
    """Return a Kantorovich potential of a (R, K), in the middle of what the plan leaves free.

    From one point of a to the next it changes by what the cost changes against the point of b that
    holds the level between them; between two such, as their mean.
    """
    f = np.zeros(np.broadcast_shapes(a.shape, b.shape))
    gap, middle = z[1:] - z[:-1], 0.5 * (z[1:] + z[:-1])
    levels = np.add.accumulate(np.broadcast_to(a, f.shape), -1)[:, :-1]
    others = np.add.accumulate(np.broadcast_to(b, f.shape), -1)
    last = z.size - 1
    for row, (level, other) in enumerate(zip(levels, others, strict=True)):
        before = np.minimum(other.searchsorted(level - LEVEL), last)
        after = np.minimum(other.searchsorted(level + LEVEL, "right"), last)
        slope = middle - 0.5 * (z[before] + z[after])
        np.add.accumulate(gap * slope, out=f[row, 1:])
    return f
