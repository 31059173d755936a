"""The points of a measure's rows that have weight, in order, and their levels."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..arrays import FEW, Array, Shape, along, starts, stretch
from .inputs import Weights


class Atoms(NamedTuple):
    """The points with weight of every row of a measure, sorted, row after row."""

    values: Array  # (K,)
    weights: Array  # (K,) of sum one a row
    upper: Array  # (K,) row + cumulative weight
    row: Array  # (K,)
    rank: Array  # (K,) place among the row's sorted points
    start: Array  # (R + 1,) first atom of each row
    source: Array  # (K,) place in the flattened points


def find_atoms(points: Array, order: Array, weights: Weights) -> tuple[Atoms, Shape]:
    """Drop absent points; return the rest and the leading shape of the measure's rows."""
    n = points.shape[-1]
    lead = points.shape[:-1]
    values = weights.values
    if values is not None and values.shape[:-1] != lead:
        lead = np.broadcast_shapes(lead, values.shape[:-1])
    rows = math.prod(lead)
    if values is None:
        kept = np.arange(rows * n)
        row = kept // n
        mass = np.full(rows * n, 1.0 / n)
        start = np.arange(0, rows * n + 1, n)
    else:
        mass, kept = _present(values, order, lead)
        row = kept // n
        mass = mass * stretch(weights.scale()[..., None], lead).reshape(-1)[row]
        start = row.searchsorted(np.arange(rows + 1))
    rank = kept - row * n
    if points.ndim == 1:
        source = order[rank]
    else:
        source = stretch(order + starts(points), lead).reshape(-1)[kept]
    upper = np.add.accumulate(mass)
    present = start[1:] > start[:-1]
    if np.logical_and.reduce(present):
        upper[start[1:] - 1] = np.arange(1.0, rows + 1)
    else:  # a row begins at its number, whatever rows before it had no mass
        upper += row + 1.0 - np.add.accumulate(present)[row]
        upper[start[1:][present] - 1] = np.flatnonzero(present) + 1.0
    return Atoms(points.reshape(-1)[source], mass, upper, row, rank, start, source), lead


def _present(weights: Array, order: Array, lead: Shape) -> tuple[Array, Array]:
    """Return the weights of the points that have any, in sorted order, and their places."""
    n = weights.shape[-1]
    if order.ndim == 1 and weights.size > FEW:
        found = np.flatnonzero(weights != 0)
        if 4 * found.size < weights.size:  # sort what is there, instead of reading all in order
            rank = np.empty_like(order)
            rank[order] = np.arange(n)
            kept = found // n * n
            found -= kept
            kept += rank[found]
            kept.sort()
            start = kept // n * n
            return weights.reshape(-1)[start + order[kept - start]], kept
    mass = stretch(along(weights, order), lead).reshape(-1)
    kept = np.flatnonzero(mass != 0)
    return mass[kept], kept


def has_ties(atoms: Atoms) -> bool:
    """Whether two points of a row coincide."""
    values = atoms.values
    return bool(((values[1:] == values[:-1]) & (atoms.row[1:] == atoms.row[:-1])).any())


def even_out(slopes: Array, mass: Array, values: Array, row: Array) -> Array:
    """Give coinciding points of a row slopes by their weights: their order says nothing.

    All (K,), row after row in the order of the values.
    """
    new = np.ones(values.size, dtype=bool)
    new[1:] = (values[1:] != values[:-1]) | (row[1:] != row[:-1])
    run = np.add.accumulate(new) - 1
    whole = np.maximum(np.bincount(run, mass), np.finfo(np.float64).tiny)
    even: Array = mass * (np.bincount(run, slopes) / whole)[run]
    return even
