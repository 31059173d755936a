"""Which points of the other side a point of a line needs, for p = 2.

``exp((g_j - |x - y_j|^2 / 2) / eps)`` is, but for a factor, ``exp((psi_j + x y_j) / eps)`` with
``psi = g - y^2 / 2``. Where psi is concave, so is the exponent in y, and the points at which it
lies above a threshold are a run. A soft minimum's psi is concave; of others the concave hull is
taken, under which they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..arrays import Array

# Entries of a block of windows.
_BLOCK = 2**16


def windows(x: Array, y: Array, g: Array, epsilon: float, depth: float) -> tuple[Array, Array]:
    """Return the first and the last point of y (M,) that each point of x (N,) needs.

    Beyond, ``exp((g_j - C_ij) / eps)`` is less than ``exp(-depth)`` times the largest of the row.
    """
    psi = (g - 0.5 * y * y) / epsilon
    distinct = np.flatnonzero(np.append(True, y[1:] > y[:-1]))
    if distinct.size < y.size:
        highest = epsilon * np.maximum.reduceat(psi, distinct) + 0.5 * y[distinct] ** 2
        low, high = windows(x, y[distinct], highest, epsilon, depth)
        return distinct[low], np.append(distinct[1:], y.size)[high] - 1
    corners = _hull(y, psi)
    place, height, t = y[corners], psi[corners], x / epsilon
    slopes = _slopes(place, height)
    top = (-slopes).searchsorted(t)
    needed = height[top] + t * place[top] - depth

    def over(corner: Array) -> Array:
        reached: Array = height[corner] + t * place[corner] >= needed
        return reached

    first = _least(over, np.zeros_like(top), top)
    last = (
        corners.size
        - 1
        - _least(lambda k: over(corners.size - 1 - k), np.zeros_like(top), corners.size - 1 - top)
    )
    # points between two corners lie under their chord
    low = np.where(first > 0, corners[np.maximum(first - 1, 0)] + 1, 0)
    high = np.where(
        last < corners.size - 1, corners[np.minimum(last + 1, corners.size - 1)] - 1, y.size - 1
    )
    return low, high


def read_windows(
    x: Array, y: Array, weights: Array, g: Array, epsilon: float, depth: float
) -> tuple[Array, Array]:
    """Return soft minima and pulls at x (N,) of a potential g of weighted points y (M,)."""
    low, high = windows(x, y, g, epsilon, depth)
    exponent = np.log(weights) + g / epsilon
    least, pulled = np.empty_like(x), np.empty_like(x)
    for rows, columns in _blocks(low, high):
        there = columns <= high[rows, None]
        columns = np.minimum(columns, y.size - 1)
        shift = x[rows, None] - y[columns]
        entries = shift * shift
        entries *= -0.5 / epsilon
        entries += exponent[columns]
        entries[~there] = -np.inf
        largest = entries.max(-1, keepdims=True)
        entries -= largest
        np.exp(entries, out=entries)
        total = entries.sum(-1)
        least[rows] = -epsilon * (np.log(total) + largest[:, 0])
        shift *= entries
        pulled[rows] = shift.sum(-1) / total
    return least, pulled


def _blocks(low: Array, high: Array) -> Iterator[tuple[slice, Array]]:
    """Yield some rows at a time and the columns of their windows, all as long as the longest."""
    start = 0
    while start < low.size:
        width = int((high[start : start + 1024] - low[start : start + 1024]).max()) + 1
        rows = slice(start, min(start + min(1024, max(_BLOCK // width, 1)), low.size))
        yield rows, low[rows, None] + np.arange(int((high[rows] - low[rows]).max()) + 1)
        start = rows.stop


def _least(reached: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Return the least k in [low, high] that is ``reached``, where high and all below it are."""
    while (low < high).any():
        middle = (low + high) // 2
        yes = reached(middle)
        high = np.where(yes, middle, high)
        low = np.where(yes, low, np.minimum(middle + 1, high))
    return low


def _slopes(place: Array, height: Array) -> Array:
    with np.errstate(over="ignore"):  # infinite slopes are in order like others
        return np.diff(height) / np.diff(place)


def _hull(y: Array, psi: Array) -> Array:
    """Return the corners of the concave hull of the points (y, psi)."""
    corners = np.arange(y.size)
    while corners.size > 2:
        place, height = y[corners], psi[corners]
        slopes = _slopes(place, height)
        bent = slopes[1:] > slopes[:-1]
        if not bent.any():
            break
        # a point under the chord of any two others is no corner; of neighbours, both may be
        corners = corners[np.concatenate([[True], ~bent, [True]])]
    return corners
