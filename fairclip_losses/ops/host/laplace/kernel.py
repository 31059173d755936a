"""The Gibbs kernel of p = 1 on a line, ``exp(-|z_i - z_j| / eps)``: O(N) a product.

The process with this covariance is Markov, so the kernel's inverse is tridiagonal, and its factors
``L D L^T`` are known: ``-exp(-gap)`` beside the ones of L and ``1 / (1 - exp(-2 gap))`` in D, gaps
in units of epsilon. A product is a solution by these factors: two sums that run along the line and
fade by ``exp(-gap)`` from point to point. All terms are positive and nothing is lost.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array
from ..newton import Look
from .newton_steps import newton_steps, self_update
from .nodes import Nodes
from .tridiagonal import solve_factors, solve_symmetric_factors

# Longest line, in units of epsilon, on which what is left of the largest term is a number.
_LONGEST = 600.0
# Least product in that scale: on lines so long that the scale has no digits left there is less.
_LEAST = 1e-300
# Shortest gap, in units of epsilon: D is a number.
_SHORTEST = 1e-280


class LaplaceKernel:
    """The kernel on sorted distinct points z (K,)."""

    def __init__(self, z: Array, epsilon: float) -> None:
        self.z, self.epsilon = z, epsilon
        self.gap = np.maximum((z[1:] - z[:-1]) / epsilon, _SHORTEST)
        self._fade = np.zeros(z.size)
        np.exp(-self.gap, out=self._fade[:-1])
        self._diagonal = np.ones(z.size)
        self._diagonal[:-1] = -1.0 / np.expm1(-2.0 * self.gap)
        self._below = -self._fade
        self._is_long = (z[-1] - z[0]) / epsilon > _LONGEST
        self.nodes = Nodes((z - z[0]) / epsilon)

    @property
    def transposed(self) -> LaplaceKernel:
        """See `HostKernel.transposed`."""
        return self

    def log_product(self, exponent: Array) -> Array:
        """See `HostKernel.log_product`."""
        scale, weight = self._scaled(exponent)
        product = self._product(scale, weight)
        np.log(np.maximum(product, _LEAST, out=product), out=product)
        product += scale
        return product

    def pull(self, exponent: Array) -> Array:
        """``sum_j P(j | i) dc(z_i, z_j) / dz_i``, (R, K); a point does not pull at itself."""
        scale, weight = self._scaled(exponent)
        rise, _ = self._fading(scale)
        # twice what lies to the left and the point itself, less all and the point itself
        ones = np.ones(self.z.size)
        left = solve_factors(-rise, ones, np.zeros_like(rise), weight.copy())
        left *= 2.0
        left -= weight
        whole = self._product(scale, weight)
        left -= whole
        left /= np.maximum(whole, _LEAST, out=whole)
        return left

    def steps(self, a: Array, b: Array, at: Look, damping: Array) -> Array:
        """See `HostKernel.steps`: banded equations."""
        return newton_steps(self.nodes, a, b, at, damping, self.epsilon)

    def self_update(self, a: Array, f: Array, due: Array) -> Array:
        """Return Newton's next potential of ``OT_eps(a, a)`` from f and its softmin."""
        return self_update(self.nodes, a, f, due, self.epsilon)

    def _scaled(self, exponent: Array) -> tuple[Array, Array]:
        """Return what the logs of the products are near to, and the weights in that scale.

        A number a row; on long lines one a point, the log of what the largest term is there.
        """
        if self._is_long:
            t = (self.z - self.z[0]) / self.epsilon
            left = np.maximum.accumulate(exponent + t, -1)
            left -= t
            scale = np.maximum.accumulate((exponent - t)[..., ::-1], -1)[..., ::-1]
            scale += t
            np.maximum(left, scale, out=scale)
        else:
            scale = np.maximum.reduce(exponent, -1, keepdims=True)
        weight = exponent - scale
        np.exp(weight, out=weight)
        return scale, weight

    def _product(self, scale: Array, weight: Array) -> Array:
        """Multiply scaled weights, which are overwritten, with the scaled kernel."""
        if not self._is_long:
            return solve_symmetric_factors(self._diagonal, self._below, weight)
        rise, fall = self._fading(scale)
        fall *= self._diagonal
        return solve_factors(-rise, self._diagonal, -fall, weight)

    def _fading(self, scale: Array) -> tuple[Array, Array]:
        """Return by how much scaled sums fade to the next point, from the left and the right."""
        if not self._is_long:
            return self._fade, self._fade
        change = scale[:, :-1] - scale[:, 1:]
        rise, fall = np.zeros_like(scale), np.zeros_like(scale)
        np.exp(change - self.gap, out=rise[:, :-1])
        np.exp(-change - self.gap, out=fall[:, :-1])
        return rise, fall
