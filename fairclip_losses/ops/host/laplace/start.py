"""A start for p = 1: the potentials that the plan has where all about a point is level.

Mass must cross from one side of a point to the other, the difference of the measures' distribution
functions there. Where both have the density n, an entropic plan of slope s = f' in [-1, 1] moves
``-2 n eps s / (1 - s^2)`` across; that determines s, and ``f + g = eps log((1 - s^2) / 2 n eps)``.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array
from ..newton import LEVEL, log_weights
from .kernel import LaplaceKernel

# Least density: where it is 0 and nothing crosses, the slope is 0.
_LEAST = 1e-290


def local_start(kernel: LaplaceKernel, a: Array, b: Array) -> Array:
    """Return a potential of a (R, K) near the optimum; level where the plan leaves it free."""
    # The kernel integrates to 2 eps: this is n eps, at the points and between them.
    density = np.exp(np.maximum(kernel.log_product(log_weights(a + b)), -600.0))
    density *= 0.25
    between = np.minimum(density[:, 1:], density[:, :-1]) * np.exp(-0.5 * kernel.gap)
    between += _LEAST
    crossing = np.add.accumulate(a - b, -1)
    crossing[np.abs(crossing) < LEVEL] = 0.0
    f = np.zeros_like(density)
    f[:, 1:] = crossing[:, :-1] * kernel.gap
    f[:, 1:] /= between + np.sqrt(between**2 + crossing[:, :-1] ** 2)
    np.add.accumulate(-f, -1, out=f)
    at_points = 0.5 * crossing
    at_points[:, 1:] += 0.5 * crossing[:, :-1]
    f -= 0.5 * np.log(density + np.sqrt(density**2 + at_points**2))
    f *= kernel.epsilon
    return f
