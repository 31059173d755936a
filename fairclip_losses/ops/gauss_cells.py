"""Cells of a line in which the coupling of p = 2 is smooth, so that a few points stand for many.

Seen from y, the coupling's density at x is ``exp((f(x) - x^2 / 2 + x y) / eps)`` but for a factor:
an analytic function of x whose singularities lie ``pi eps / (2 sd)`` off the line or more, sd that
of y given x. So in a cell of some ``eps / sd`` a polynomial of low degree stands for the density:
its integrals are those of Gauss points with the cell's moments (`gauss_points`), and a potential
read at Chebyshev points is known at all points (`Interpolation`).

A cell set is its edges (C + 1,): cell k has the points ``edges[k]`` to ``edges[k + 1] - 1`` of the
sorted, distinct points (N,).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.polynomial.chebyshev import chebpts1, chebval, chebvander

from .line_newton import CUMULATIVE_WEIGHT_TOL, Array

# Most parts of a cell in one pass: a few far points make the mean slope of a long cell a poor one.
MAX_PARTS = 32
# Cumulative weights that are as near as this are equal here.
MASS_TOL = 8.0 * CUMULATIVE_WEIGHT_TOL
# Norm of a polynomial, relative to a cell's mass, that is rounding: the cell has no more nodes.
MIN_NORM = 1e-13


class Measure:
    """Points (N,) in any order, with ties, and weights (N,) of sum one of which some may be 0."""

    def __init__(self, points: Array, weights: Array) -> None:
        present = np.flatnonzero(weights > 0)
        order = present[points[present].argsort()]
        x = points[order]
        is_new = np.append(True, x[1:] != x[:-1])
        first = np.flatnonzero(is_new)
        self._order, self._which = order, np.add.accumulate(is_new) - 1
        self.places = order[first]  # (P,) of the distinct points, in order
        self.points, self.weights = x[first], np.add.reduceat(weights[order], first)
        self.cumulative = np.add.accumulate(self.weights)
        self._weights, self._all = weights, points

    def spread(self, values: Array, beyond: Callable[[Array], Array] | None = None) -> Array:
        """Put values (P,) in the order of the points, (1, N); those absent have 0 or ``beyond``."""
        full = np.zeros(self._all.size)
        full[self._order] = values[self._which]
        if beyond and (absent := np.flatnonzero(self._weights <= 0)).size:
            full[absent] = beyond(self._all[absent])
        return full[None]


def divide(
    own: Measure, image: Measure, epsilon: float, max_points: int, max_length: float
) -> Array:
    """Return edges of cells of ``own`` no longer than ``max_length * eps / sd``.

    The optimal transport map T to ``image`` tells sd before anything is solved: ``sd^2`` is near
    ``eps T'``, taken over thrice the cell, as the blur smooths T; where T jumps, sd is half of the
    gap. Cells of at most ``max_points`` are left as they are. The outermost points stand for
    themselves: potentials beyond the outermost nodes would be extrapolated.
    """
    x, y = own.points, image.points
    gaps, cumulative = np.append(np.diff(y), 0.0), np.append(0.0, own.cumulative)
    edges = np.unique([0, 1, x.size - 1, x.size])
    while True:
        first, last = edges[:-1], edges[1:] - 1
        length = x[last] - x[first]
        low = x.searchsorted(x[first] - length)
        high = x.searchsorted(x[last] + length, "right") - 1
        before, after = cumulative[low] + MASS_TOL, cumulative[high + 1] - MASS_TOL
        begin = np.minimum(image.cumulative.searchsorted(before, "right"), y.size - 1)
        end = np.clip(image.cumulative.searchsorted(after), begin, y.size - 1)
        pairs = np.stack([begin, end], -1).reshape(-1)
        gap = np.where(end > begin, np.maximum.reduceat(gaps, pairs)[::2], 0.0)
        span = x[high] - x[low]
        slope = (y[end] - y[begin]) / np.where(span > 0.0, span, 1.0)
        smooth = length * np.sqrt(slope / epsilon) / max_length
        short = np.maximum(smooth, 0.5 * gap * length / (max_length * epsilon)) <= 1.0
        short |= last - first < max_points
        if short.all():
            return edges
        edges = cut(x, edges, np.where(short, 1, np.clip(np.ceil(smooth), 2, MAX_PARTS)))


def cut(x: Array, edges: Array, parts: Array) -> Array:
    """Cut cells into so many parts (C,) of equal length; those without points are left out."""
    more = parts.astype(int) - 1
    cell = np.arange(more.size).repeat(more)
    part = np.arange(1, cell.size + 1) - (np.add.accumulate(more) - more).repeat(more)
    first, last = edges[cell], edges[cell + 1] - 1
    found = x.searchsorted(x[first] + (x[last] - x[first]) * (part / parts[cell]))
    # at least one point on either side, however near to each other they are
    return np.unique(np.concatenate([edges, np.clip(found, first + 1, last)]))


def gauss_points(x: Array, weights: Array, edges: Array, order: int) -> tuple[Array, Array, Array]:
    """Return nodes, their weights and each cell's first node (C,): at most ``order`` a cell.

    By Gauss quadrature: ``q`` nodes have the cell's moments up to the ``2 q - 1``th.
    """
    sizes = np.diff(edges)
    many = sizes > order
    count = np.minimum(sizes, order)
    starts = np.add.accumulate(count) - count
    nodes, node_weights = np.empty(count.sum()), np.empty(count.sum())
    copied, into = (~many).repeat(sizes), (~many).repeat(count)
    nodes[into], node_weights[into] = x[copied], weights[copied]
    if many.any():
        found = _quadrature(x[~copied], weights[~copied], sizes[many], order)
        nodes[~into], node_weights[~into] = (part.reshape(-1) for part in found)
    kept = node_weights > 0.0  # the others' mass is in fewer points
    starts = np.append(0, np.add.accumulate(kept))[starts]
    return nodes[kept], node_weights[kept], starts


def _quadrature(x: Array, weights: Array, sizes: Array, order: int) -> tuple[Array, Array]:
    """Return nodes and their weights (C, order) of cells of more points than nodes.

    Stieltjes' procedure gives the recurrence of the cells' orthogonal polynomials; the nodes are
    the eigenvalues of its Jacobi matrix (Golub and Welsch 1969).
    """
    starts = np.add.accumulate(sizes) - sizes
    low, high = x[starts], x[starts + sizes - 1]
    middle, half = 0.5 * (low + high), 0.5 * (high - low)
    u = (x - middle.repeat(sizes)) / half.repeat(sizes)
    mass = np.add.reduceat(weights, starts)
    # polynomials of norm one, times the roots of the weights
    own, previous = np.sqrt(weights / mass.repeat(sizes)), np.zeros_like(u)
    norm = np.zeros_like(mass)
    jacobi = np.zeros((sizes.size, order, order))
    for k in range(order):
        product = u * own
        jacobi[:, k, k] = mean = np.add.reduceat(product * own, starts)
        if k == order - 1:
            break
        product -= mean.repeat(sizes) * own
        product -= norm.repeat(sizes) * previous
        norm = np.sqrt(np.add.reduceat(product * product, starts))
        norm[norm < MIN_NORM] = 0.0
        jacobi[:, k + 1, k] = norm
        inverse = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0.0)
        previous, own = own, product * inverse.repeat(sizes)
    values, vectors = np.linalg.eigh(jacobi)  # reads the lower triangle
    nodes = middle[:, None] + half[:, None] * np.clip(values, -1.0, 1.0)
    return nodes, mass[:, None] * vectors[:, 0, :] ** 2


class Interpolation:
    """Smooth functions by each cell's ``places``: Chebyshev points, or its own if they are few."""

    def __init__(self, x: Array, edges: Array, order: int) -> None:
        sizes = np.diff(edges)
        many = sizes > order
        self._order, self._copied = order, (~many).repeat(sizes)
        low, high = x[edges[:-1][many]], x[edges[1:][many] - 1]
        middle, half = 0.5 * (low + high), 0.5 * (high - low)
        self._cell = np.arange(middle.size).repeat(sizes[many])
        self._u = (x[~self._copied] - middle[self._cell]) / half[self._cell]
        roots = (middle[:, None] + half[:, None] * chebpts1(order)).reshape(-1)
        self.places = np.concatenate([x[self._copied], roots])

    def at_points(self, values: Array) -> Array:
        """Return (N,) from values at the places, by each cell's Chebyshev series."""
        own, order = np.count_nonzero(self._copied), self._order
        matrix = chebvander(chebpts1(order), order - 1)
        series = np.linalg.solve(matrix, values[own:].reshape(-1, order).T)
        found = np.empty(self._copied.size)
        found[self._copied] = values[:own]
        found[~self._copied] = chebval(self._u, series[:, self._cell], tensor=False)
        return found
