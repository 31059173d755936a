"""Entropic problems of p = 2 between rows of points of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from .arrays import Array
from .band_entries import BandEntries
from .dense_entries import DenseEntries
from .gauss import Entries, GaussKernel, quadratic_start
from .newton import HostKernel, Look, log_weights
from .ragged import Ragged, Table
from .windows import read_windows

# Most entries of a row that are all kept in memory, and of the rows that are solved at once.
_DENSE, _AT_ONCE = 2**16, 2**18
# Entries that are less than exp(-depth) of the largest are not read.
_DEPTH = 45.0

SolvePair = Callable[[HostKernel, Array, Array, Array], tuple[Look, int]]
SolveSelf = Callable[[HostKernel, Array], tuple[Array, Array]]


class Plan:
    """What is known of both sides of each row's plan."""

    def __init__(self, one: Ragged, other: Ragged) -> None:
        self.f, self.g = np.zeros_like(one.points), np.zeros_like(other.points)
        self.sd_x = np.zeros_like(one.points)  # of where the mass of x goes
        self.sd_y = np.zeros_like(other.points)
        self.cost = np.zeros(one.count.size)
        self.rounds = 0


def solve_between(
    one: Ragged, other: Ragged, epsilon: float, f: Array | None, solve: SolvePair
) -> Plan:
    """Solve ``OT_eps`` of each row, from potentials f near those of ``one``, or the exact ones."""
    plan = Plan(one, other)
    for rows, dense in _batches(one, other):
        a, b = one.table(rows), other.table(rows)
        if f is None:
            start = quadratic_start(a.points, b.points, a.weights, b.weights)
        else:
            start = f[a.place]
        kernel = GaussKernel(a.weights, b.weights, epsilon, _entries(a, b, epsilon, dense))
        if a.place.shape[-1] <= b.place.shape[-1]:
            best, rounds = solve(kernel, a.weights, b.weights, start)
            due, g = best.due, best.g
        else:  # Newton's equations are those of the fewer points
            start = -epsilon * kernel.transposed.log_product(
                log_weights(a.weights) + start / epsilon
            )
            best, rounds = solve(kernel.transposed, b.weights, a.weights, start)
            due, g = best.g, best.due
        plan.cost[rows] = (a.weights * due).sum(-1) + (b.weights * g).sum(-1)
        plan.rounds = max(plan.rounds, rounds)
        a.put(due, plan.f)
        b.put(g, plan.g)
        a.put(kernel.deviation(log_weights(b.weights) + g / epsilon, b.points), plan.sd_x)
        exponent = log_weights(a.weights) + due / epsilon
        b.put(kernel.transposed.deviation(exponent, a.points), plan.sd_y)
    return plan


def solve_within(one: Ragged, epsilon: float, solve: SolveSelf) -> Plan:
    """Solve ``OT_eps`` of each row with itself."""
    plan = Plan(one, one)
    for rows, dense in _batches(one, one):
        a = one.table(rows)
        kernel = GaussKernel(a.weights, a.weights, epsilon, _entries(a, a, epsilon, dense))
        before, after = solve(kernel, a.weights)
        plan.cost[rows] = (a.weights * (before + after)).sum(-1)
        a.put(after, plan.f)
        exponent = log_weights(a.weights) + after / epsilon
        a.put(kernel.deviation(exponent, a.points), plan.sd_x)
    plan.g, plan.sd_y = plan.f, plan.sd_x
    return plan


def read(places: Ragged, other: Ragged, g: Array, epsilon: float) -> tuple[Array, Array]:
    """Return soft minima and pulls at the places of each row of a potential g of the other side."""
    least, pulled = np.empty_like(places.points), np.empty_like(places.points)
    for rows, dense in _batches(places, other):
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
    entries = x[:, :, None] - y[:, None, :]
    entries *= entries
    entries *= -0.5 / epsilon
    entries += exponent[:, None, :]
    largest = np.maximum.reduce(entries, -1, keepdims=True)
    entries -= largest
    np.exp(entries, out=entries)
    sums = entries @ np.stack([np.ones_like(y), y], -1)
    least = -epsilon * (np.log(sums[..., 0]) + largest[..., 0])
    return least, x - sums[..., 1] / sums[..., 0]


def _entries(a: Table, b: Table, epsilon: float, dense: bool) -> Entries:
    return (DenseEntries if dense else BandEntries)(a.points, b.points, epsilon)


def _batches(one: Ragged, other: Ragged) -> Iterator[tuple[Array, bool]]:
    """Yield rows that are solved at once, and whether with all entries in memory."""
    entries = one.count * other.count
    small = entries <= _DENSE
    for row in np.flatnonzero(~small):
        yield np.array([row]), False
    rows = np.flatnonzero(small & (entries > 0))
    if rows.size:
        most = one.count[rows].max() * other.count[rows].max()
        size = max(_AT_ONCE // most, 1)
        for start in range(0, rows.size, size):
            yield rows[start : start + size], True
