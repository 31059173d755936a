"""Entropic transport on a line for p = 1 on the CPU: O(N) an iteration.

The Gibbs kernel ``exp(-|z_i - z_j| / eps)`` is the covariance of a Markov process: its inverse T is
tridiagonal, with known factors ``L D L^T``, ``-exp(-gap)`` beside the ones of L and
``1 / (1 - exp(-2 gap))`` in D, gaps in units of epsilon. A product is a solution by these: two sums
that run along the line and fade by ``exp(-gap)`` from point to point, all terms positive. Newton's
equations are banded for the same reason. All rows share the sorted points z (K,) of both measures.
"""

from __future__ import annotations

import numpy as np
import scipy  # loads what is used of it, and that when it is used

from .line_newton import (
    CUMULATIVE_WEIGHT_TOL,
    MAX_EXPONENT,
    Array,
    Between,
    DualState,
    Within,
    heavy_ball_within,
    join_rows,
    log_weights,
    newton_between,
)
from .options import SinkhornOptions

# Longest line, in units of epsilon, on which what is left of the largest term is a number.
MAX_LENGTH_EPS = 600.0
# Least product in that scale: on lines so long that the scale has no digits left there is less.
MIN_PRODUCT = 1e-300
# Shortest gap, in units of epsilon, so that D is a number; and in Newton's equations, where entries
# of neighbours that are larger than the others' by more lose these.
MIN_GAP_EPS, MIN_NEWTON_GAP_EPS = 1e-280, 1e-7
# Distance of the nodes on which Newton's equations are solved, in units of epsilon: their unknowns
# are products with the kernel, straight in between to 1e-3, and the next iteration takes the error.
NODE_DISTANCE_EPS = 0.1
# Largest log of an entry beside the diagonal: a larger one is of a potential far from any optimum.
MAX_LOG_COUPLING = 30.0
# Least damping. Without any all rows sum to 0, and where the coupling between clusters is less than
# rounding, each cluster's do: steps that change nothing would be any number.
MIN_DAMPING = 1e-10
# Least density of the start: where it is 0 and nothing crosses, the slope is 0.
MIN_DENSITY = 1e-290
# Weights of the rows that are solved at once: their arrays stay in the processor's cache.
BLOCK = 2**16
# Fewest points of a line: LAPACK's wrappers take no fewer.
MIN_POINTS = 3


class LaplaceLineSolver:
    """Solves p = 1 for points x (N,) and y (M,)."""

    def __init__(self, x: Array, y: Array, options: SinkhornOptions) -> None:
        self.options = options
        points = x if y is x else np.concatenate([x, y])
        z, places = np.unique(points, return_inverse=True)
        self._x, self._y = places[: x.size], places[-y.size :]
        if z.size < MIN_POINTS:
            z = np.concatenate([z, np.repeat(z[-1:], MIN_POINTS)])
        self._kernel = LaplaceKernel(z, options.epsilon)

    def between(self, a: Array, b: Array) -> Between:
        """Solve ``OT_eps(a, b)`` for weights a (1 or R, N) and b (R, M)."""
        a, b = self._spread(a, self._x), self._spread(b, self._y)
        blocks = self._blocks(b)
        return join_rows([self._between(a if len(a) == 1 else a[k], b[k]) for k in blocks])

    def within(self, a: Array, b: Array) -> tuple[Within, Within]:
        """Solve ``OT_eps(a, a)`` and ``OT_eps(b, b)`` for weights (R, N) and (S, M)."""
        both = np.concatenate([self._spread(a, self._x), self._spread(b, self._y)])
        cost, f, grad = join_rows([self._within(both[k]) for k in self._blocks(both)])
        n, x, y = len(a), self._x, self._y
        return Within(cost[:n], f[:n, x], grad[:n, x]), Within(cost[n:], f[n:, y], grad[n:, y])

    def _between(self, a: Array, b: Array) -> Between:
        kernel, epsilon = self._kernel, self.options.epsilon
        start = closed_form_start(kernel, a, b)
        best, iterations = newton_between(kernel, a, b, start, self.options)
        grad_x = kernel.mean_sign(log_weights(b) + best.g)[:, self._x]
        grad_y = kernel.mean_sign(log_weights(a) + best.f_next)[:, self._y]
        f, g = epsilon * best.f_next, epsilon * best.g
        cost = (a * f).sum(-1) + (b * g).sum(-1)
        return Between(cost, f[:, self._x], g[:, self._y], grad_x, grad_y, iterations)

    def _within(self, a: Array) -> Within:
        """Solve for weights a (R, K) of all points of the line."""
        epsilon = self.options.epsilon
        f, f_next = heavy_ball_within(self._kernel, a, self.options)
        grad = self._kernel.mean_sign(log_weights(a) + f)
        return Within(epsilon * (a * (f + f_next)).sum(-1), epsilon * f_next, grad)

    def _blocks(self, weights: Array) -> list[slice]:
        size = max(BLOCK // weights.shape[-1], 1)
        return [slice(k, k + size) for k in range(0, len(weights), size)]

    def _spread(self, weights: Array, places: Array) -> Array:
        """Put weights (R, N) of the points at these places on the line: (R, K)."""
        size = self._kernel.z.size
        return np.stack([np.bincount(places, row, size) for row in weights])


class LaplaceKernel:
    """The kernel on sorted points z (K,), as a `LineKernel`."""

    def __init__(self, z: Array, epsilon: float) -> None:
        self.z, self.t = z, (z - z[0]) / epsilon
        # to the next point; none is after the last
        self.gap = np.append(np.maximum(np.diff(z) / epsilon, MIN_GAP_EPS), np.inf)
        self._below, self._diagonal = -np.exp(-self.gap[:-1]), -1.0 / np.expm1(-2.0 * self.gap)
        self._is_long = self.t[-1] > MAX_LENGTH_EPS
        # nodes of Newton's equations: one in each cell, and both ends of longer gaps
        is_node = np.diff(np.floor(self.t / NODE_DISTANCE_EPS), prepend=-1.0) > 0
        is_node[:-1] |= np.diff(self.t) > NODE_DISTANCE_EPS
        is_node[-1] = True
        self._nodes = np.flatnonzero(is_node)
        self._node = np.cumsum(is_node) - 1  # of each point: the last one up to it
        gap = np.maximum(np.diff(self.t[self._nodes]), MIN_NEWTON_GAP_EPS)
        self._part = (self.t - self.t[self._nodes][self._node]) / np.append(gap, 1.0)[self._node]
        # log of less the entries of T between neighbours
        self._log_coupling = -gap - np.log(-np.expm1(-2.0 * gap))

    @property
    def transposed(self) -> LaplaceKernel:
        """The kernel itself: both sides have all points."""
        return self

    def log_product(self, exponent: Array) -> Array:
        """``log sum_j exp(exponent_j - |z_i - z_j| / eps)``, (R, K)."""
        scale, weight = self._scaled(exponent)
        product: Array = np.log(np.maximum(self._product(scale, weight), MIN_PRODUCT))
        return product + scale

    def mean_sign(self, exponent: Array) -> Array:
        """``sum_j P(j | i) sign(z_i - z_j)``, the cost's gradient in z_i per unit of its mass."""
        scale, weight = self._scaled(exponent)
        left = self._solve(scale, weight.copy(), only_left=True)
        # twice what lies to the left and the point itself, less all and the point itself
        twice = 2.0 * left - weight
        whole = self._product(scale, weight)
        return (twice - whole) / np.maximum(whole, MIN_PRODUCT)

    def steps(self, a: Array, b: Array, at: DualState, damping: Array) -> Array:
        """Solve Newton's equations.

        The unknowns are means over the coupling P, ``q = P^T d / b`` of a's step d and
        ``h = P q / (P 1)`` of those. Both are products with the kernel, of inverse T:

            e^g T (e^-g q) = a e^(f+g) d,   d = a / (P 1) - 1 + h,
            e^f_next T (e^-f_next h) = b e^(f_next+g) q.

        Where q, d and h are 1 the left sides are the weights on the right: the rows of T so scaled
        sum to these. That gives the diagonal, and no entry depends on more than the differences
        of the potentials between neighbours. The damping takes its part from the h in d.
        """
        step: Array = np.expm1(np.minimum(at.f_next - at.f, MAX_EXPONENT))
        mass_a = a * np.exp(np.minimum(at.f + at.g, MAX_EXPONENT))
        mass_b = b * np.exp(np.minimum(at.f_next + at.g, MAX_EXPONENT))
        masses = np.stack([mass_a * step, mass_a, mass_b])
        # divided between the nodes on either side: (3, R, J)
        after = masses * self._part
        gathered: Array = np.add.reduceat(masses - after, self._nodes, -1)
        gathered[..., 1:] += np.add.reduceat(after, self._nodes, -1)[..., :-1]
        # The unknowns are (q_1, h_1, q_2, h_2, ...): two bands on either side of the diagonal.
        # LAPACK reads the bands of a column together: entry (i, j) is the (i - j + 4)th of j.
        bands = np.zeros((len(step), self._nodes.size, 2, 7))
        right = np.zeros(bands.shape[:3])
        right[..., 0], mass_a, mass_b = gathered
        for unknown, potential, mass in ((0, at.g, mass_a), (1, at.f_next, mass_b)):
            change = np.diff(potential[:, self._nodes])
            after = np.exp(np.minimum(self._log_coupling - change, MAX_LOG_COUPLING))
            before = np.exp(np.minimum(self._log_coupling + change, MAX_LOG_COUPLING))
            of_unknown = bands[:, :, unknown]
            of_unknown[..., 4] = mass
            of_unknown[:, :-1, 4] += after
            of_unknown[:, 1:, 4] += before
            of_unknown[:, 1:, 2] = -after
            of_unknown[:, :-1, 6] = -before
        bands[:, :, 0, 5] = -mass_b
        bands[:, :, 1, 3] = (np.maximum(damping, MIN_DAMPING) - 1.0) * mass_a
        for own_bands, own_right in zip(bands, right, strict=True):
            own_right[:] = scipy.linalg.lapack.dgbsv(
                2, 2, own_bands.reshape(-1, 7).T, own_right.reshape(-1, 1),
                overwrite_ab=True, overwrite_b=True,
            )[2].reshape(-1, 2)  # fmt: skip
        h = right[..., 1]
        step += h[:, self._node] + self._part * np.diff(h, append=0.0)[:, self._node]
        step -= (a * step).sum(-1, keepdims=True)
        step[~np.isfinite(step)] = 0.0
        return step

    def _scaled(self, exponent: Array) -> tuple[Array, Array]:
        """Return the largest log of a row, or at each point of a long line, and weights by it."""
        if self._is_long:
            left = np.maximum.accumulate(exponent + self.t, -1) - self.t
            right = np.maximum.accumulate((exponent - self.t)[:, ::-1], -1)[:, ::-1] + self.t
            scale = np.maximum(left, right)
        else:
            scale = exponent.max(-1, keepdims=True)
        return scale, np.exp(exponent - scale)

    def _product(self, scale: Array, weight: Array) -> Array:
        """Multiply scaled weights, which are overwritten, with the scaled kernel."""
        if not self._is_long:
            solved: Array = scipy.linalg.lapack.dpttrs(
                self._diagonal, self._below, weight.T, overwrite_b=True
            )[0]
            return solved.T
        return self._solve(scale, weight)

    def _solve(self, scale: Array, weight: Array, only_left: bool = False) -> Array:
        """Solve with the factors in that scale, or with L alone, which sums up what lies left.

        All rows are one long system, in which the last gap of each parts it from the next.
        """
        change = np.diff(np.broadcast_to(scale, weight.shape), append=0.0)
        below = -np.exp(-change - self.gap).reshape(-1)
        diagonal = np.broadcast_to(self._diagonal, weight.shape)
        above = -diagonal * np.exp(change - self.gap)
        if only_left:
            diagonal, above = np.ones(weight.shape), np.zeros(weight.shape)
        solved: Array = scipy.linalg.lapack.dgttrs(
            below[:-1], diagonal.reshape(-1), above.reshape(-1)[:-1], np.zeros(weight.size - 2),
            np.arange(1, weight.size + 1, dtype=np.int32), weight.reshape(-1, 1), overwrite_b=True,
        )[0]  # fmt: skip
        return solved.reshape(weight.shape)


def closed_form_start(kernel: LaplaceKernel, a: Array, b: Array) -> Array:
    """Return f (R, K) that the coupling has where all about a point is level.

    Mass must cross from one side of a point to the other, the difference of the cumulative weights
    there. Where both measures have the density n, an entropic coupling of slope s = f' in [-1, 1]
    moves ``-2 n eps s / (1 - s^2)`` across; that determines s, and, both in units of epsilon,
    ``f + g = log((1 - s^2) / 2 n eps)``.
    """
    # the kernel integrates to 2 eps: this is n eps, at the points and between them
    density = 0.25 * np.exp(np.maximum(kernel.log_product(log_weights(a + b)), -600.0))
    gap = kernel.gap[:-1]
    between = np.minimum(density[:, 1:], density[:, :-1]) * np.exp(-0.5 * gap) + MIN_DENSITY
    crossing = np.cumsum(a - b, -1)
    crossing[np.abs(crossing) < CUMULATIVE_WEIGHT_TOL] = 0.0
    slope = crossing[:, :-1] / (between + np.hypot(between, crossing[:, :-1]))
    f = np.zeros_like(density)
    f[:, 1:] = -np.cumsum(slope * gap, -1)
    at_points = 0.5 * crossing
    at_points[:, 1:] += 0.5 * crossing[:, :-1]
    f -= 0.5 * np.log(density + np.hypot(density, at_points))
    return f
