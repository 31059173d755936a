"""Cells of a line in which the coupling of p = 2 is smooth, so that a few points stand for many.

Seen from y, the coupling's density at x is ``exp((f(x) - x^2 / 2 + x y) / eps)`` but for a factor:
an analytic function of x that changes over a length of ``eps / sd(y | x)``. Where the mass of x
goes to two places alone, half to each, its singularities lie ``pi eps / (2 sd)`` off the line; that
is the worst case. In a cell whose length is a small multiple of ``eps / sd`` a polynomial of low
degree thus stands for the density: its integrals are those of Gauss points with the cell's moments
(`gauss_points`), and a potential read at Chebyshev points is known at all points (`Interpolation`).

A cell set is its edges (C + 1,): cell k has the points ``edges[k]`` to ``edges[k + 1] - 1`` of the
sorted, distinct points (N,).
"""

from __future__ import annotations

from functools import cache

import numpy as np

from .line_newton import CUMULATIVE_WEIGHT_TOL, Array

# Most parts of a cell in one pass: a few far points make the mean slope of a long cell a poor one.
MAX_PARTS = 32
# Norm of a polynomial, relative to a cell's mass, that is rounding: the cell has no more nodes.
MIN_NORM = 1e-13


def divide(
    x: Array, cumulative_x: Array, y: Array, cumulative_y: Array, epsilon: float,
    max_points: int, max_length: float,
) -> Array:  # fmt: skip
    """Return edges of cells of x no longer than ``max_length * eps / sd``.

    The optimal transport map T to y tells sd before anything is solved: ``sd^2`` is near ``eps
    T'``, with T' the length of the image over that of the cell, both of thrice the cell, as the
    blur smooths T. Where T jumps over a gap, sd is half of the gap. Cells of at most
    ``max_points`` are left as they are, and the outermost points stand for themselves, however
    light they are: potentials beyond the outermost nodes would be extrapolated.
    """
    gaps = np.append(np.diff(y), 0.0)
    edges = np.unique([0, 1, x.size - 1, x.size])
    while True:
        first, last = edges[:-1], edges[1:] - 1
        length = x[last] - x[first]
        low = x.searchsorted(x[first] - length)
        high = x.searchsorted(x[last] + length, "right") - 1
        before = np.where(low > 0, cumulative_x[low - 1], 0.0)
        begin = cumulative_y.searchsorted(before + 8.0 * CUMULATIVE_WEIGHT_TOL, "right")
        end = cumulative_y.searchsorted(cumulative_x[high] - 8.0 * CUMULATIVE_WEIGHT_TOL)
        begin = np.minimum(begin, y.size - 1)
        end = np.clip(end, begin, y.size - 1)
        pairs = np.stack([begin, end], -1).reshape(-1)
        gap = np.where(end > begin, np.maximum.reduceat(gaps, pairs)[::2], 0.0)
        span = x[high] - x[low]
        image = (y[end] - y[begin]) * length / np.where(span > 0.0, span, 1.0)
        smooth = np.sqrt(length * image / epsilon) / max_length
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

    Gauss quadrature: ``q`` nodes integrate polynomials up to degree ``2 q - 1`` as the cell's own
    points do, with positive weights, so the problem between nodes is one of the same kind.
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
    """Functions that are smooth in each cell, read at ``places`` and known at all points.

    Cells of more than ``order`` points have Chebyshev points, the others their own.
    """

    def __init__(self, x: Array, edges: Array, order: int) -> None:
        sizes = np.diff(edges)
        many = sizes > order
        self._order, self._copied = order, (~many).repeat(sizes)
        low, high = x[edges[:-1][many]], x[edges[1:][many] - 1]
        middle, half = 0.5 * (low + high), 0.5 * (high - low)
        self._cell = np.arange(middle.size).repeat(sizes[many])
        self._u = (x[~self._copied] - middle[self._cell]) / half[self._cell]
        roots = (middle[:, None] + half[:, None] * _chebyshev(order)[0]).reshape(-1)
        self.places = np.concatenate([x[self._copied], roots])

    def at_points(self, values: Array) -> Array:
        """Return (N,) from values at the places, by Clenshaw's sum of each Chebyshev series."""
        own = self.places.size - self._order * (self._cell[-1] + 1 if self._cell.size else 0)
        series = np.ascontiguousarray(
            (values[own:].reshape(-1, self._order) @ _chebyshev(self._order)[1]).T
        )
        one = two = np.zeros_like(self._u)
        for k in range(self._order - 1, 0, -1):
            one, two = series[k][self._cell] + 2.0 * self._u * one - two, one
        found = np.empty(self._copied.size)
        found[self._copied] = values[:own]
        found[~self._copied] = series[0][self._cell] + self._u * one - two
        return found


@cache
def _chebyshev(order: int) -> tuple[Array, Array]:
    """Return the Chebyshev points (order,) in [-1, 1] and the map of values to coefficients."""
    angles = (np.arange(order) + 0.5) * (np.pi / order)
    matrix = 2.0 / order * np.cos(angles[:, None] * np.arange(order))
    matrix[:, 0] *= 0.5
    return np.cos(angles), matrix
