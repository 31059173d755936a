"""The exact cost by quantile functions: what each point costs, from integrals of the other side.

Write X(u) for the quantile function of a, a step function, and I1, I2 for the running integrals of
X and X^2: piecewise linear, with a knot for each point of x. For p = 2 a point y_j, which holds the
levels (B_{j-1}, B_j], has

    cost_j = 1/2 dI2 - y_j dI1 + 1/2 y_j^2 dB,    d cost / d y_j = y_j dB - dI1

so a search of the levels B among the knots is all it takes; for p = 1 one more, of y_j among the
points of x. The gradient in x is the same with the measures exchanged, summed over all rows at
once: piecewise linear again. All groups of a batch together so cost what the batch costs once.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np

from ..arrays import Array, HostSolution, Shape
from .atoms import Atoms, even_out, find_atoms, has_ties
from .inputs import Weights, both_have_mass


def solve_by_quantiles(x: Array, y: Array, a: Weights, b: Weights, p: int) -> HostSolution:
    """Any p: what each point costs by the integrals of the other side's quantile function.

    For p = 1 the points x and their weights must be one row.
    """
    order = x.argsort(-1)
    one, lead_x = find_atoms(x, order, a)
    other, lead_y = find_atoms(y, order if y is x else y.argsort(-1), b)
    lead = np.broadcast_shapes(lead_x, lead_y)
    has_mass = True if a.complete and b.complete else both_have_mass(a, b, lead)
    if not (one.values.size and other.values.size):
        return HostSolution(np.zeros(lead), lambda grad: (np.zeros(x.shape), np.zeros(y.shape)))
    merge = _merge(one, other, _rows(lead_x, lead), _rows(lead_y, lead))
    tied_x = has_ties(one)
    all_common = y is x and one.values.size == x.size  # then what coincides in y does in x
    tied_y = tied_x and has_ties(other) if all_common else has_ties(other)
    if p == 2:
        costs, slope_y, jumps = _squares(one, merge)
    else:
        rank = other.rank[merge.knot] if all_common and not tied_x else None
        costs, slope_y, jumps = _area(one, merge, rank)
    cost = np.bincount(merge.problem, costs, merge.row_x.size).reshape(lead)
    cost = np.asarray(np.maximum(cost, 0.0) * has_mass)

    def gradients(grad: Array) -> tuple[Array, Array]:
        grad = (grad * has_mass).reshape(-1)
        from_y = slope_y * grad[merge.problem]
        if tied_y:
            from_y = even_out(from_y, merge.mass, other.values[merge.knot], merge.problem)
        to_y = np.bincount(other.source[merge.knot], from_y, y.size).reshape(y.shape)
        from_x = _between_levels(one.upper, jumps, grad)
        if p == 2:
            weight = np.bincount(merge.row_x, grad, one.start.size - 1)
            from_x += one.weights * merge.values * weight[one.row]
        if tied_x:
            from_x = even_out(from_x, one.weights, one.values, one.row)
        to_x = np.bincount(one.source, from_x, x.size).reshape(x.shape)
        return (to_x + to_y, to_y) if y is x else (to_x, to_y)

    return HostSolution(cost, gradients)


class _Merge(NamedTuple):
    """The points y of every problem, one problem after the other, among the levels of x.

    Point j holds the levels ``lower`` to ``level``; ``drop`` is what X, the quantile function of x,
    integrates to between them. Values are centred.
    """

    row_x: Array  # (R,) row of x of each problem
    problem: Array  # (J,)
    knot: Any  # (J,) which atoms of y
    first: Array  # (R', ) first point of each problem that has points
    last: Array  # (R',)
    filled: Array  # (R',) those problems
    place: Array  # (J,) y_j
    mass: Array  # (J,)
    lower: Array  # (J,)
    level: Array  # (J,)
    cell: Array  # (J,) atom of x that ``level`` lies in
    values: Array  # (K,) of x
    below: Array  # (R',) atom of x before each problem's first, or -1

    def rise(self, at_level: Array, at_atoms: Array) -> Array:
        """Return how far an integral rises over each point, from its values at the levels."""
        rise = at_level.copy()
        rise[1:] -= at_level[:-1]
        start = at_atoms[self.below] * (self.below >= 0)
        rise[self.first] = at_level[self.first] - start
        return rise


def _merge(one: Atoms, other: Atoms, row_x: Array, row_y: Array) -> _Merge:
    middle = np.add.reduce(one.values) / one.values.size
    knot, problem, start = _knots(other, row_y)
    level = other.upper[knot] + (row_x - row_y)[problem]
    cell = np.minimum(one.upper.searchsorted(level), one.upper.size - 1)
    filled = np.flatnonzero(start[1:] > start[:-1])
    first, last = start[filled], start[filled + 1] - 1
    lower = np.empty_like(level)
    lower[1:] = level[:-1]
    lower[first] = row_x[filled]
    return _Merge(
        row_x, problem, knot, first, last, filled, other.values[knot] - middle,
        other.weights[knot], lower, level, cell, one.values - middle, one.start[row_x[filled]] - 1,
    )  # fmt: skip


def _rows(lead: Shape, whole: Shape) -> Array:
    """Return which row of a measure each problem is of."""
    count = math.prod(lead)
    if lead == whole:
        return np.arange(count)
    if count == 1:
        return np.zeros(math.prod(whole), dtype=np.int64)
    return np.broadcast_to(np.arange(count).reshape(lead), whole).reshape(-1)


def _knots(atoms: Atoms, rows: Array) -> tuple[Any, Array, Array]:
    """Return the atoms of each problem's row, which problem they are of and where each begins."""
    if rows.size == atoms.start.size - 1:  # a row a problem, in order
        return slice(None), atoms.row, atoms.start
    count = atoms.start[rows + 1] - atoms.start[rows]
    start = np.concatenate([[0], np.add.accumulate(count)])
    problem = np.repeat(np.arange(rows.size), count)
    knot = np.arange(problem.size) + (atoms.start[rows] - start[:-1])[problem]
    return knot, problem, start


class _Jumps(NamedTuple):
    """A step function of the level for every problem, by its jumps."""

    size: Array  # (J,)
    level: Array  # (J,)
    cell: Array  # (J,) first atom of x that ends at the level or above
    problem: Array  # (J,)


def _between_levels(upper: Array, jumps: _Jumps, grad: Array) -> Array:
    """Integrate the problems' step functions, each times its gradient, over every atom of x."""
    size = jumps.size * grad[jumps.problem]
    slope = np.add.accumulate(np.bincount(jumps.cell, size, upper.size))
    offset = np.add.accumulate(np.bincount(jumps.cell, size * jumps.level, upper.size))
    integral: Array = upper * slope - offset
    integral[1:] -= integral[:-1].copy()
    return integral


def _squares(one: Atoms, merge: _Merge) -> tuple[Array, Array, _Jumps]:
    """p = 2: return the points' costs, their slopes, and -Y, whose integrals are x's slopes."""
    values, place, cell = merge.values, merge.place, merge.cell
    moment = one.weights * values
    mean = np.add.accumulate(moment)
    moment *= values
    square = np.add.accumulate(moment)
    partner = values[cell]
    rest = one.upper[cell] - merge.level
    part = partner * rest
    drop = merge.rise(mean[cell] - part, mean)
    part *= partner
    drop_square = merge.rise(square[cell] - part, square)
    cost = 0.5 * drop_square + place * (0.5 * place * merge.mass - drop)
    slope = merge.mass * place - drop
    # Where all of y_j goes to one point, nothing is left to the rounding of long sums: a measure
    # costs nothing against itself.
    alone = merge.mass + rest <= one.weights[cell]
    shift = place - partner
    own = merge.mass * shift
    np.copyto(slope, own, where=alone)
    own *= shift
    own *= 0.5
    np.copyto(cost, own, where=alone)
    jump = place.copy()
    jump[:-1] -= place[1:]
    jump[merge.last] = place[merge.last]
    start = np.minimum(merge.below + 1, one.upper.size - 1)
    jumps = _Jumps(
        np.concatenate([jump, -place[merge.first]]),
        np.concatenate([merge.level, merge.lower[merge.first]]),
        np.concatenate([cell, start]),
        np.concatenate([merge.problem, merge.filled]),
    )
    return cost, slope, jumps


def _area(one: Atoms, merge: _Merge, rank: Array | None) -> tuple[Array, Array, _Jumps]:
    """p = 1: return the points' costs, their slopes, and sign(X - Y), likewise.

    Of the levels of y_j, X is below y_j up to ``left``, above from ``right`` on. ``rank`` (J,) says
    which atom of x each point is, where it is one and no two coincide.
    """
    values, place, cell = merge.values, merge.place, merge.cell
    lower, level = merge.lower, merge.level
    mean = np.add.accumulate(one.weights * values)
    at_level = mean[cell] - values[cell] * (one.upper[cell] - level)
    at_lower = at_level - merge.rise(at_level, mean)
    cell_lower = np.empty_like(cell)
    cell_lower[1:] = cell[:-1]
    cell_lower[merge.first] = 0

    def meet(side: Literal["left", "right"]) -> tuple[Array, Array, Array]:
        if rank is None:
            atom = values.searchsorted(place, side) - 1
        else:
            atom = rank - 1 if side == "left" else rank
        inner = np.where(atom >= 0, one.upper[atom], 0.0)
        below, above = inner < lower, inner > level
        return (
            np.where(below, lower, np.where(above, level, inner)),
            np.where(
                below, at_lower, np.where(above, at_level, np.where(atom >= 0, mean[atom], 0.0))
            ),
            np.where(below, cell_lower, np.where(above, cell, np.maximum(atom, 0))),
        )

    left, at_left, cell_left = meet("left")
    right, at_right, cell_right = meet("right")
    slope = (left - lower) - (level - right)
    cost = place * slope - (at_left - at_lower) + (at_level - at_right)
    step = np.ones_like(place)
    end = np.full_like(place, -2.0)
    end[merge.last] = -1.0
    jumps = _Jumps(
        np.concatenate([step, step, end, -step[merge.first]]),
        np.concatenate([left, right, level, lower[merge.first]]),
        np.concatenate([cell_left, cell_right, cell, np.zeros_like(merge.first)]),
        np.concatenate([merge.problem, merge.problem, merge.problem, merge.filled]),
    )
    return cost, slope, jumps
