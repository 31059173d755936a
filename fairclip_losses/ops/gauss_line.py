"""The entropic problem of p = 2 on a line, on the CPU: near-linear in the points at any blur.

A few nodes with the moments of a cell stand for its points where the coupling is smooth
(`gauss_cells`). Newton's method solves the problem between those nodes, and the potentials and
gradients are read at places from which they are known at all points. Cells are cut where the
coupling that was found shows that they add more than ``tol`` to the marginal error.

Everything is about one pair of measures, a row of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import scipy  # loads what is used of it, and that when it is used

from .gauss_cells import Interpolation, Measure, cut, divide, gauss_points
from .line_newton import (
    CUMULATIVE_WEIGHT_TOL,
    MAX_EXPONENT,
    Array,
    Between,
    DualState,
    Within,
    heavy_ball_within,
    marginal_violation,
    newton_between,
)
from .options import SinkhornOptions, warn_unconverged

# Nodes of a cell, and points of a measure up to which laying out cells costs more than it saves.
NODES, MIN_POINTS = 8, 128
# Part of ``tol`` that cells are laid out for, and times that they may be made finer.
CELL_TOL_FACTOR, MAX_REFINEMENTS = 0.1, 6
# Most costs that are all kept: above, those in windows take less time.
MAX_DENSE_COSTS = 2**15
# Largest cost, in units of epsilon, whose rounding potentials stand; beyond, so many are all kept,
# less the potentials of the optimal coupling.
MAX_ROUNDED_COST_EPS, MAX_REDUCED_COSTS = 1e10, 2**20
# Terms of a sum below exp(-depth) times the largest are left out: less than its rounding.
WINDOW_DEPTH = 40.0
# Entries that are looked at at once: temporary arrays stay in the processor's cache.
BLOCK = 2**16
# The least part of a point's mass in the diagonal of Newton's matrix.
MIN_DIAGONAL = 1e-3
# Rounding of a potential, relative to the largest cost. What is added to that diagonal to keep the
# matrix regular is above it, within bounds.
ROUNDING, MIN_SHIFT, MAX_SHIFT = 1e-16, 1e-12, 1e-8
# Numbers below, and above its inverse: sums have lost what they were of, products are slow.
MIN_NUMBER = 1e-100
# Part of the roots of both weights below which an entry is left out of Newton's banded equations.
MIN_COUPLING = 1e-12


def solve_between(x: Measure, y: Measure, options: SinkhornOptions, potentials: bool) -> Between:
    """Solve ``OT_eps(x, y)``; ``potentials`` asks for those at points without weight."""
    start, iterations = None, 0
    one, other = _Side(x, y, options), _Side(y, x, options)
    for left in range(MAX_REFINEMENTS, -1, -1):
        cost, at_x, at_y, taken = _solve_nodes(one, other, start, options)
        iterations += taken
        error = one.judge(at_x.sd) + other.judge(at_y.sd)
        if error <= options.tol or options.iterations is not None or not left:
            break
        one.refine()
        start, _ = other.read(one.nodes, at_y)
        other.refine()
    warn_unconverged(error, options, iterations)
    f, grad_x = one.at_points(at_x, other, at_y, potentials)
    g, grad_y = other.at_points(at_y, one, at_x, potentials)
    return Between(cost, f, g, grad_x, grad_y, iterations)


def solve_within(x: Measure, options: SinkhornOptions, potentials: bool) -> Within:
    """Solve ``OT_eps(x, x)``; see `solve_between`."""
    epsilon, side = options.epsilon, _Side(x, x, options)
    for left in range(MAX_REFINEMENTS, -1, -1):
        kernel = _kernel(side, side, epsilon, None)
        before, after = heavy_ball_within(kernel, side.weights[None], options)
        solved = _Solved(epsilon * after[0], *kernel.moments(after[0], side.nodes))
        error = 2.0 * side.judge(solved.sd)
        if error <= options.tol or options.iterations is not None or not left:
            break
        side.refine()
    warn_unconverged(error, options, MAX_REFINEMENTS)
    cost = epsilon * (side.weights * (before + after)).sum(-1)
    return Within(cost, *side.at_points(solved, side, solved, potentials))


def marginal_error(x: Measure, y: Measure, f: Array, g: Array, epsilon: float) -> float:
    """Return the L1 error of both marginals of the coupling of potentials f (N,) and g (M,)."""
    error = 0.0
    for one, own, other, across in ((x, f, y, g), (y, g, x, f)):
        due, _ = read(one.points, other.points, other.weights, across[other.places], epsilon)
        error += marginal_violation(one.weights, own[one.places] / epsilon, due / epsilon).sum()
    return error


class _Solved(NamedTuple):
    """What is known at the nodes of a side, (K,)."""

    potential: Array
    mean: Array  # of where the mass of a node goes
    sd: Array


class _Side:
    """A measure and the nodes that stand for it in a problem with another measure.

    Of what a cell of ``h = k eps / sd`` adds to the marginal error, ``r^-2q`` bounds the part, with
    q nodes a cell and r the radius of the ellipse around it on which the nearest singularity may
    lie, ``r - 1 / r = 2 pi / k``.
    """

    def __init__(self, own: Measure, image: Measure, options: SinkhornOptions) -> None:
        self.own, self._epsilon = own, options.epsilon
        radius = min(CELL_TOL_FACTOR * options.tol, 0.01) ** (-0.5 / NODES)
        self._max_length = 2.0 * np.pi / (radius - 1.0 / radius)
        edges = np.arange(own.points.size + 1)
        if own.points.size > MIN_POINTS:
            edges = divide(own, image, options.epsilon, NODES, self._max_length)
        self._lay_out(edges)

    def _lay_out(self, edges: Array) -> None:
        own, self._edges = self.own, edges
        self.nodes, self.weights, self._starts = gauss_points(own.points, own.weights, edges, NODES)

    def judge(self, sd: Array) -> float:
        """Return the most that cells add to the marginal error; ``sd`` is that of the nodes."""
        length = self.own.points[self._edges[1:] - 1] - self.own.points[self._edges[:-1]]
        length[np.diff(self._edges) <= NODES] = 0.0
        k = length * np.maximum.reduceat(sd, self._starts) / self._epsilon
        self._parts = np.ceil(np.maximum(k / self._max_length, 1.0))
        part = np.exp(-2.0 * NODES * np.arcsinh(np.pi / np.maximum(k, 1e-6)))
        return float((part * np.add.reduceat(self.weights, self._starts)).sum())

    def refine(self) -> None:
        """Cut the cells that were judged to be too long."""
        self._lay_out(cut(self.own.points, self._edges, self._parts))

    def read(self, places: Array, solved: _Solved) -> tuple[Array, Array]:
        """Return the c-transform of the nodes' potential at places of the other side."""
        return read(places, self.nodes, self.weights, solved.potential, self._epsilon)

    def at_points(
        self, solved: _Solved, other: _Side, across: _Solved, potentials: bool
    ) -> tuple[Array, Array]:
        """Return potential and gradient (1, N) at all points."""
        f, grad = solved.potential, self.nodes - solved.mean
        if self.nodes.size < self.own.points.size:
            smooth = Interpolation(self.own.points, self._edges, 2 * NODES)
            f, grad = (smooth.at_points(values) for values in other.read(smooth.places, across))
        beyond = (lambda places: other.read(places, across)[0]) if potentials else None
        return self.own.spread(f, beyond), self.own.spread(grad)


def _solve_nodes(
    one: _Side, other: _Side, start: Array | None, options: SinkhornOptions
) -> tuple[Array, _Solved, _Solved, int]:
    """Solve from a potential near ``start`` or the optimal coupling's; the cost is (1,)."""
    x, y, a, b, epsilon = one.nodes, other.nodes, one.weights, other.weights, options.epsilon
    crossings, exact = _optimal_coupling(x, y, a, b)
    kernel = _kernel(one, other, epsilon, crossings)
    base_f, base_g = np.zeros_like(x), np.zeros_like(y)
    if not isinstance(kernel, BandKernel):  # what the costs are less of
        base_f, base_g = exact, 0.5 * (x[0] - y) ** 2 - epsilon * kernel.cost[0]
    f = ((exact if start is None else start) - base_f)[None] / epsilon
    if x.size <= y.size:  # Newton's equations are those of the fewer nodes
        state, iterations = newton_between(kernel, a, b, f, options)
        f, g = state.f_next[0], state.g[0]
    else:
        g = -kernel.transposed.log_product(np.log(a) + f)
        state, iterations = newton_between(kernel.transposed, b, a, g, options)
        f, g = state.g[0], state.f_next[0]
    at_x = _Solved(base_f + epsilon * f, *kernel.moments(g, y))
    at_y = _Solved(base_g + epsilon * g, *kernel.transposed.moments(f, x))
    cost = (a * at_x.potential).sum() + (b * at_y.potential).sum()
    return np.array([cost]), at_x, at_y, iterations


def _optimal_coupling(x: Array, y: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """Return the y at which the coupling goes over to the next x, or the middle of two; and f."""
    weight, others, last = np.add.accumulate(a)[:-1], np.add.accumulate(b), y.size - 1
    before = np.minimum(others.searchsorted(weight - CUMULATIVE_WEIGHT_TOL), last)
    after = np.minimum(others.searchsorted(weight + CUMULATIVE_WEIGHT_TOL, "right"), last)
    crossings = 0.5 * (y[before] + y[after])
    change = np.diff(x) * (0.5 * (x[1:] + x[:-1]) - crossings)
    return crossings, np.append(0.0, np.add.accumulate(change))


def _kernel(one: _Side, other: _Side, epsilon: float, crossings: Array | None) -> GaussKernel:
    """Return the kernel between nodes, its costs less the optimal coupling's potentials.

    Along x the rest falls while the crossings lie below y and rises beyond: summed away from its
    zero it is exact, where a difference of costs and potentials is lost in their rounding.
    """
    x, y, logs = one.nodes, other.nodes, [np.log(one.weights), np.log(other.weights)]
    farthest = max(y[-1] - x[0], x[-1] - y[0])
    is_rounded = farthest**2 > MAX_ROUNDED_COST_EPS * epsilon
    if x.size * y.size > (MAX_REDUCED_COSTS if is_rounded else MAX_DENSE_COSTS):
        return BandKernel(x, y, logs, epsilon)
    if crossings is None:
        return GaussKernel((x[:, None] - y) ** 2 * (0.5 / epsilon), logs)
    change = (crossings[:, None] - y) * (np.diff(x) / epsilon)[:, None]
    rest = np.zeros((x.size, y.size))
    np.add.accumulate(np.maximum(change, 0.0), 0, out=rest[1:])
    rest[:-1] += np.add.accumulate(np.maximum(-change, 0.0)[::-1], 0)[::-1]
    return GaussKernel(rest, logs)


class GaussKernel:
    """The kernel between x (N,) and y (M,), with costs and potentials in units of epsilon.

    Products are sums of numbers, not of logs: those with the entries ``exp(u_i + v_j - C_ij)`` of
    potentials u and v near the ones that are asked for. The transposed kernel shares the entries.
    """

    max_change = 300.0  # of a potential, up to which the entries serve

    def __init__(self, cost: Array, log_weights: list[Array]) -> None:
        self.side = 0  # 1: the view from y to x
        self.cost, self.log_weights = cost, log_weights
        self.potentials = [np.full(logs.size, np.inf) for logs in log_weights]  # u, v
        self.shared: dict[str, Any] = {}  # the entries (N, M)

    @cached_property
    def transposed(self) -> GaussKernel:
        """See `LineKernel.transposed`."""
        view = copy(self)
        view.side = 1 - self.side
        return view

    @property
    def entries(self) -> Any:
        """The entries of this view, (N, M) or (M, N)."""
        return self.shared["entries"].T if self.side else self.shared["entries"]

    def log_product(self, exponent: Array) -> Array:
        """See `LineKernel.log_product`; for (1, M)."""
        (sums,) = self._sums(exponent[0] - self.log_weights[1 - self.side])
        product: Array = np.log(sums) - self.potentials[self.side]
        return product[None]

    def moments(self, g: Array, y: Array) -> tuple[Array, Array]:
        """Return mean and deviation (N,) of y (M,) in the coupling out of each x, at g (M,)."""
        total, *sums = self._sums(g, y, y * y)
        mean, square = (part / total for part in sums)
        return mean, np.sqrt(np.maximum(square - mean * mean, 0.0))

    def _sums(self, g: Array, *values: Array) -> Array:
        """Return ``sum_j b_j exp(u_i + g_j - C_ij)``, (1 + k, N), and those times k values (M,)."""
        across = 1 - self.side
        self._follow(g)
        for is_last in (False, True):
            exponent = g - self.potentials[across] + self.log_weights[across]
            weight = np.exp(np.minimum(exponent, MAX_EXPONENT))
            sums: Array = (self.entries @ np.stack([weight, *(weight * v for v in values)], -1)).T
            serves = sums[0].min() > MIN_NUMBER and sums[0].max() < 1.0 / MIN_NUMBER  # not NaN
            if is_last or serves:
                break
            self.rescale(across, g)
        return sums

    def _follow(self, g: Array) -> None:
        """Rescale the entries if they do not serve for the potential g of the other side."""
        across = 1 - self.side
        if not np.abs(g - self.potentials[across]).max() <= self.max_change:  # or no number
            self.rescale(across, g)

    def steps(self, a: Array, b: Array, at: DualState, damping: Array) -> Array:
        """See `LineKernel.steps`; equations scaled by the weights, so that they are symmetric."""
        roots = [np.sqrt(a), np.sqrt(b)]
        kept = np.exp(np.minimum(at.f[0] - at.f_next[0], MAX_EXPONENT))
        self._follow(at.g[0])
        # sqrt(a_i b_j) exp(f_i + g_j - C_ij)
        left, right = (
            np.exp(np.minimum(f[0] + 0.5 * self.log_weights[k] - self.potentials[k], MAX_EXPONENT))
            for f, k in ((at.f, self.side), (at.g, 1 - self.side))
        )
        try:
            return (self.solve(left, right, roots, roots[0] * (1.0 - kept)) / roots[0])[None]
        except np.linalg.LinAlgError:  # not a number: a plain update instead
            plain: Array = 1.0 / np.maximum(kept, MIN_NUMBER) - 1.0
            return plain[None]

    def rescale(self, side: int, potential: Array) -> None:
        """Set u (side 0) or v (1), its softmin as the other one, and the entries."""
        entries = potential - (self.cost if side else self.cost.T)
        weighted = entries + self.log_weights[side]
        largest = weighted.max(-1, keepdims=True)
        weighted -= largest
        sums = np.exp(weighted, out=weighted).sum(-1)
        across = -(np.log(sums) + largest[:, 0])
        entries += across[:, None]
        np.exp(np.minimum(entries, MAX_EXPONENT, out=entries), out=entries)
        self.shared["entries"] = entries if side else entries.T
        self.potentials[side], self.potentials[1 - side] = potential, across

    def solve(self, left: Array, right: Array, roots: list[Array], violation: Array) -> Array:
        """Solve ``(D_a - B D_b^-1 B^T) d = violation`` (N,) for scaled entries B, or LinAlgError.

        Diagonals by the null vectors, the roots of the weights, agree with the entries beyond the
        rounding of the potentials.
        """
        plan = self.entries * left[:, None]
        plan *= right
        plan[plan < MIN_NUMBER] = 0.0
        of_rows = _null_diagonal(plan @ roots[1], roots[0])
        plan *= np.sqrt(1.0 / _null_diagonal(roots[0] @ plan, roots[1]))
        matrix = -(plan @ plan.T)
        matrix[np.diag_indices(left.size)] += of_rows + MIN_SHIFT
        _, solved, info = scipy.linalg.lapack.dposv(matrix, violation, overwrite_a=True)
        if info:
            raise np.linalg.LinAlgError("not positive definite")
        return np.asarray(solved)


class BandKernel(GaussKernel):
    """See `GaussKernel`: the entries in windows around the coupling, between ordered points."""

    max_change = 4.0

    def __init__(self, x: Array, y: Array, log_weights: list[Array], epsilon: float) -> None:
        super().__init__(np.zeros(0), log_weights)
        self._points, self._blur2 = [x, y], epsilon
        rounding = ROUNDING * max(y[-1] - x[0], x[-1] - y[0]) ** 2 / epsilon
        self._shift = min(max(rounding, MIN_SHIFT), MAX_SHIFT)

    def rescale(self, side: int, potential: Array) -> None:
        """See `GaussKernel.rescale`; every point of either side keeps what it needs."""
        from scipy.sparse import csr_array  # here, since it adds a filter to Python's warnings

        epsilon, logs = self._blur2, self.log_weights[side]
        x, y = self._points[1 - side], self._points[side]
        self.shared["entries"] = None  # before there are others: the two are most of what is held
        # the coupling's density is at most 1 / a_i, and what is below exp(-depth) adds nothing
        depths = [WINDOW_DEPTH - logs for logs in self.log_weights]
        low, high = windows(x, y, epsilon * potential, epsilon, depths[1 - side])
        least, _ = read(x, y, np.exp(logs), epsilon * potential, epsilon)
        first, last = windows(y, x, least, epsilon, depths[side])
        first = np.minimum.accumulate(first[::-1])[::-1]
        every = np.arange(x.size)
        low = np.minimum(low, np.maximum.accumulate(last).searchsorted(every))
        high = np.maximum(high, first.searchsorted(every, "right") - 1)
        ends = np.append(0, np.add.accumulate(high - low + 1))
        indices, data = np.empty(ends[-1], np.int32), np.empty(ends[-1])
        across = least / epsilon
        for rows, columns, entries, (_, count) in _in_windows(x, y, low, high, potential, epsilon):
            entries += across[rows].repeat(count)
            some = slice(ends[rows.start], ends[rows.stop])
            indices[some], data[some] = columns, np.exp(np.minimum(entries, MAX_EXPONENT))
        found = csr_array((data, indices, ends.astype(np.int32)), (x.size, y.size))
        self.shared["entries"] = found if side else found.T
        self.potentials[side], self.potentials[1 - side] = potential, across

    def solve(self, left: Array, right: Array, roots: list[Array], violation: Array) -> Array:
        """See `GaussKernel.solve`; the equations of both sides, in the plan's order, are a band."""
        plan = self.entries.tocoo()
        rows, columns = plan.row, plan.col
        middle = np.bincount(rows, columns, left.size) / np.bincount(rows, minlength=left.size)
        places = np.append(np.maximum.accumulate(middle), np.arange(right.size))
        place_x, place_y = np.split(places.argsort(kind="stable").argsort(), [left.size])
        values = plan.data * left[rows] * right[columns]
        kept = np.flatnonzero(values > MIN_COUPLING)
        rows, columns, values = rows[kept], columns[kept], values[kept]
        sums_x = np.bincount(rows, values * roots[1][columns], left.size)
        sums_y = np.bincount(columns, values * roots[0][rows], right.size)
        row, column = place_x[rows], place_y[columns]
        distance = np.abs(row - column)
        bands = np.zeros((left.size + right.size, int(distance.max(initial=0)) + 1))
        bands[np.minimum(row, column), distance] = values
        bands[place_x, 0] = _null_diagonal(sums_x, roots[0]) + self._shift
        bands[place_y, 0] = _null_diagonal(sums_y, roots[1]) + self._shift
        right = np.zeros(len(bands))
        right[place_x] = violation
        solved = scipy.linalg.solveh_banded(
            bands.T, right, True, True, lower=True, check_finite=False
        )
        return np.asarray(solved)[place_x]


def _null_diagonal(times_roots: Array, roots: Array) -> Array:
    """Return the diagonal for which the roots of the weights are a null vector."""
    return np.maximum(times_roots / roots, MIN_DIAGONAL)


def read(x: Array, y: Array, b: Array, g: Array, epsilon: float) -> tuple[Array, Array]:
    """Return the c-transform at x (N,) of a potential g of ordered y (M,), and its gradient."""
    exponent, least, grad = np.log(b) + g / epsilon, np.empty_like(x), np.empty_like(x)
    low, high = windows(x, y, epsilon * exponent, epsilon, WINDOW_DEPTH)
    for rows, columns, entries, (starts, count) in _in_windows(x, y, low, high, exponent, epsilon):
        largest = np.maximum.reduceat(entries, starts)
        weights = np.exp(entries - largest.repeat(count))  # in units of the largest
        total = np.add.reduceat(weights, starts)
        least[rows] = -epsilon * (np.log(total) + largest)
        weights *= x[rows].repeat(count) - y[columns]
        grad[rows] = np.add.reduceat(weights, starts) / total
    return least, grad


def windows(
    x: Array, y: Array, g: Array, epsilon: float, depth: Array | float
) -> tuple[Array, Array]:
    """Return the first and the last point of ordered y (M,) that each point of x (N,) needs.

    Beyond, ``exp((g_j - C_ij) / eps)`` is less than ``exp(-depth)`` times the largest of the row,
    ``depth`` a number or (N,). The exponent is, but for a term of x, ``psi_j + x y_j / eps`` with
    ``psi = (g - y^2 / 2) / eps``. Where psi is concave, the points above a threshold are a run. A
    softmin's psi is; of others the concave hull is taken, under which they lie.
    """
    psi, t = (g - 0.5 * y * y) / epsilon, x / epsilon
    rounding = 10.0 * ROUNDING * (np.abs(psi).max() + np.abs(t).max() * max(abs(y[0]), abs(y[-1])))
    corners = np.arange(y.size)
    while True:
        place, height = y[corners], psi[corners]
        with np.errstate(over="ignore"):  # infinite slopes are in order like others
            slopes = np.diff(height) / np.maximum(np.diff(place), 1e-300)  # nodes may coincide
        bent = slopes[1:] > slopes[:-1]
        if not bent.any():
            break
        # a point under the chord of any two others is no corner; of neighbours, both may be
        corners = corners[np.concatenate([[True], ~bent, [True]])]
    top, last = (-slopes).searchsorted(t), corners.size - 1
    needed = height[top] + t * place[top] - depth - rounding

    # bisect on either side of the top for the farthest corner above the threshold
    near, t, needed = np.tile(top, 2), np.tile(t, 2), np.tile(needed, 2)
    far = np.repeat([0, last], top.size)
    outwards = np.repeat([0, 1], top.size)  # rounds the middle to the far end
    while (near != far).any():
        middle = (near + far + outwards) // 2
        above = height[middle] + t * place[middle] >= needed
        near, far = np.where(above, middle, near), np.where(above, far, middle + 1 - 2 * outwards)
    first, final = np.split(near, 2)
    # points between two corners lie under their chord: all from beyond the one before
    corners = np.concatenate([[-1], corners, [y.size]])
    return corners[first] + 1, corners[final + 2] - 1


def _in_windows(
    x: Array, y: Array, low: Array, high: Array, exponent: Array, epsilon: float
) -> Iterator[tuple[slice, Array, Array, tuple[Array, Array]]]:
    """Yield rows, their columns, ``exponent_j - C_ij / eps``, and each row's start and size."""
    count = high - low + 1
    ends = np.add.accumulate(count)
    begin = 0
    while begin < x.size:
        stop = int(ends.searchsorted(ends[begin] - count[begin] + BLOCK, "right"))
        rows = slice(begin, max(stop, begin + 1))
        size = count[rows]
        starts = ends[rows] - size
        starts -= starts[0]
        columns = np.arange(starts[-1] + size[-1]) + (low[rows] - starts).repeat(size)
        entries = x[rows].repeat(size) - y[columns]
        entries *= entries
        entries *= -0.5 / epsilon
        entries += exponent[columns]
        yield rows, columns, entries, (starts, size)
        begin = rows.stop
