"""Gauss quadrature of what a measure has in each cell: a few points with the same moments.

``q`` points integrate polynomials up to degree ``2 q - 1`` as the cell's own points do, with
positive weights: the transport problem between them is one of the same kind. The three-term
recurrence of the cell's orthogonal polynomials is found by Stieltjes' procedure, and its points are
the eigenvalues of the Jacobi matrix (Golub and Welsch 1969).
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array
from .cells import Cells
from .ragged import Ragged

# Part of a cell's mass below which a polynomial's square is rounding: there are no more points.
_NOTHING = 1e-26


def compress(measures: Ragged, cells: Cells, order: int) -> Ragged:
    """Return measures with at most ``order`` points a cell for the same integrals."""
    heavy = cells.sizes > order
    if not heavy.any():
        return measures
    count = np.minimum(cells.sizes, order)
    end = np.add.accumulate(count)
    points, weights = np.empty(end[-1]), np.empty(end[-1])
    copied = np.repeat(~heavy, cells.sizes)
    into = np.repeat(~heavy, count)
    points[into], weights[into] = measures.points[copied], measures.weights[copied]
    nodes, masses = _rules(
        measures.points[~copied], measures.weights[~copied], cells.sizes[heavy], order
    )
    points[~into], weights[~into] = nodes.reshape(-1), masses.reshape(-1)
    return Ragged(
        points, weights, np.add.reduceat(count, cells.first.searchsorted(measures.starts))
    )


def _rules(points: Array, weights: Array, count: Array, order: int) -> tuple[Array, Array]:
    """Return the nodes and their weights (C, order) of cells of ``count`` points each."""
    starts = np.concatenate([[0], np.add.accumulate(count)[:-1]])
    low, high = points[starts], points[starts + count - 1]
    middle, half = 0.5 * (low + high), 0.5 * (high - low)
    u = (points - np.repeat(middle, count)) / np.repeat(half, count)
    mass = np.add.reduceat(weights, starts)
    there = mass > 0
    diagonal = np.zeros((count.size, order))
    beside = np.zeros((count.size, order - 1))
    polynomial = np.where(np.repeat(there, count), 1.0, 0.0)
    previous = np.zeros_like(polynomial)
    scale = np.where(there, mass, 1.0)
    polynomial /= np.sqrt(np.repeat(scale, count))  # of norm one
    for k in range(order):
        shifted = u * polynomial
        diagonal[:, k] = np.add.reduceat(weights * shifted * polynomial, starts)
        if k == order - 1:
            break
        shifted -= np.repeat(diagonal[:, k], count) * polynomial
        if k:
            shifted -= np.repeat(beside[:, k - 1], count) * previous
        square = np.add.reduceat(weights * shifted * shifted, starts)
        more = square > _NOTHING
        norm = np.sqrt(np.where(more, square, 1.0))
        beside[:, k] = np.where(more, norm, 0.0)
        previous, polynomial = (
            polynomial,
            shifted * np.repeat(np.where(more, 1.0 / norm, 0.0), count),
        )
    jacobi = np.zeros((count.size, order, order))
    places = np.arange(order)
    jacobi[:, places, places] = diagonal
    jacobi[:, places[1:], places[:-1]] = beside
    values, vectors = np.linalg.eigh(jacobi)
    nodes = middle[:, None] + half[:, None] * np.clip(values, -1.0, 1.0)
    return nodes, mass[:, None] * vectors[:, 0, :] ** 2
