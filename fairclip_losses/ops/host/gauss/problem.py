"""Entropic problems of p = 2 between rows of points of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..arrays import Array
from ..newton import HostKernel, Look, log_weights
from .band_entries import BandEntries
from .dense_entries import DenseEntries, reduced_costs, squares
from .kernel import Entries, GaussKernel, crossings, kantorovich
from .ragged import Ragged, Table
from .windows import read_windows

# Most entries of a row that are all kept in memory, and of the rows that are solved at once.
_DENSE, _AT_ONCE = 2**15, 2**16
# Largest cost, in units of epsilon, whose rounding the potentials stand; beyond, the costs are
# reduced, which takes all entries, up to so many.
_ROUNDED, _REDUCED = 1e10, 2**20
# Entries that are less than exp(-depth) of the largest are not read.
_DEPTH = 45.0

SolvePair = Callable[[HostKernel, Array, Array, Array], tuple[Look, int]]
SolveSelf = Callable[[HostKernel, Array], tuple[Array, Array]]


class Plan:
    """What is known of both sides of each row's plan."""

    def __init__(self, one: Ragged, other: Ragged) -> None:
        self.x, self.y = Side(one), Side(other)
        self.cost = np.zeros(one.count.size)
        self.rounds = 0


class Side:
    """What is known at the points of one side, (P,)."""

    def __init__(self, own: Ragged) -> None:
        self.potential, self.pull, self.deviation = (np.zeros(own.points.size) for _ in range(3))

    def put(self, own: Table, potential: Array, moments: tuple[Array, Array]) -> None:
        """Write some rows: a potential, and mean and deviation of where the mass goes."""
        own.put(potential, self.potential)
        own.put(own.points - moments[0], self.pull)
        own.put(moments[1], self.deviation)


def solve_between(
    one: Ragged, other: Ragged, epsilon: float, near: Array | None, solve: SolvePair
) -> Plan:
    """Solve ``OT_eps`` of each row, from potentials near those of ``one``, or the exact ones."""
    plan = Plan(one, other)
    for rows, dense in _batches(one, other, epsilon):
        a, b = one.table(rows), other.table(rows)
        crossing = crossings(a.points, b.points, a.weights, b.weights)
        exact = kantorovich(a.points, crossing)
        f = exact if near is None else near[a.place]
        entries: Entries
        if dense:
            cost = reduced_costs(a.points, b.points, crossing, epsilon)
            base_f, base_g = exact, 0.5 * (a.points[:, :1] - b.points) ** 2 - epsilon * cost[:, 0]
            entries = DenseEntries(cost)
        else:
            base_f, base_g = np.zeros_like(a.points), np.zeros_like(b.points)
            entries = BandEntries(a.points, b.points, epsilon)
        kernel = GaussKernel(a.weights, b.weights, entries)
        f, g, rounds = _solve(kernel, a.weights, b.weights, (f - base_f) / epsilon, solve)
        plan.x.put(a, base_f + epsilon * f, kernel.moments(g, b.points))
        plan.y.put(b, base_g + epsilon * g, kernel.transposed.moments(f, a.points))
        plan.cost[rows] = (a.weights * (base_f + epsilon * f)).sum(-1)
        plan.cost[rows] += (b.weights * (base_g + epsilon * g)).sum(-1)
        plan.rounds = max(plan.rounds, rounds)
    return plan


def _solve(
    kernel: GaussKernel, a: Array, b: Array, f: Array, solve: SolvePair
) -> tuple[Array, Array, int]:
    """Return both potentials, by Newton's equations of the fewer points."""
    if a.shape[-1] <= b.shape[-1]:
        best, rounds = solve(kernel, a, b, f)
        return best.due, best.g, rounds
    g = -kernel.transposed.log_product(kernel.log_a + f)
    best, rounds = solve(kernel.transposed, b, a, g)
    return best.g, best.due, rounds


def solve_within(one: Ragged, epsilon: float, solve: SolveSelf) -> Plan:
    """Solve ``OT_eps`` of each row with itself."""
    plan = Plan(one, one)
    for rows, dense in _batches(one, one, epsilon):
        a = one.table(rows)
        entries: Entries
        if dense:
            entries = DenseEntries(squares(a.points, a.points, epsilon))
        else:
            entries = BandEntries(a.points, a.points, epsilon)
        kernel = GaussKernel(a.weights, a.weights, entries)
        before, after = solve(kernel, a.weights)
        plan.x.put(a, epsilon * after, kernel.moments(after, a.points))
        plan.cost[rows] = epsilon * (a.weights * (before + after)).sum(-1)
    plan.y = plan.x
    return plan


def read(places: Ragged, other: Ragged, g: Array, epsilon: float) -> tuple[Array, Array]:
    """Return soft minima and pulls at the places of each row of a potential g of the other side."""
    least, pulled = np.empty_like(places.points), np.empty_like(places.points)
    for rows, dense in _batches(places, other, epsilon):
        x, y = places.table(rows), other.table(rows)
        if dense:
            exponent = log_weights(y.weights) + g[y.place] / epsilon
            found = _read_all(x.points, y.points, exponent, epsilon)
        else:
            kept = y.place[0, y.weights[0] > 0]
            one, two = read_windows(
                x.points[0], other.points[kept], other.weights[kept], g[kept], epsilon, _DEPTH
            )
            found = one[None], two[None]
        x.put(found[0], least)
        x.put(found[1], pulled)
    return least, pulled


def _read_all(x: Array, y: Array, exponent: Array, epsilon: float) -> tuple[Array, Array]:
    entries = exponent[:, None, :] - squares(x, y, epsilon)
    largest = np.maximum.reduce(entries, -1, keepdims=True)
    entries -= largest
    np.exp(entries, out=entries)
    sums = entries @ np.stack([np.ones_like(y), y], -1)
    least = -epsilon * (np.log(sums[..., 0]) + largest[..., 0])
    return least, x - sums[..., 1] / sums[..., 0]


def _batches(one: Ragged, other: Ragged, epsilon: float) -> Iterator[tuple[Array, bool]]:
    """Yield rows that are solved at once, and whether with all entries in memory."""
    entries = one.count * other.count
    if not entries.any():  # nothing to be read at absent points, where there are none
        return
    small = entries <= _DENSE
    if not small.all() and _farthest(one, other) ** 2 > _ROUNDED * epsilon:
        small = entries <= _REDUCED
    for row in np.flatnonzero(~small):
        yield np.array([row]), False
    rows = np.flatnonzero(small & (entries > 0))
    if rows.size:
        most = one.count[rows].max() * other.count[rows].max()
        size = max(_AT_ONCE // most, 1)
        for start in range(0, rows.size, size):
            yield rows[start : start + size], True


def _farthest(one: Ragged, other: Ragged) -> float:
    """Return the longest distance between points of either side, of any row."""
    ends = [(side.points.min(), side.points.max()) for side in (one, other)]
    return float(max(ends[0][1] - ends[1][0], ends[1][1] - ends[0][0]))
