"""The entropic divergence on a line whose tensors lie on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ..checks import broadcast_shapes
from ..options import SinkhornOptions
from ..solution import EntropicSolution, Slopes
from .arrays import Array, Shape, stretch
from .gauss import MOST_ENTRIES
from .line_solver import LineSolver, RaggedSolver

# Most rows with points of their own: they are solved one after the other.
_MOST_ROWS = 64


def suits_host_solver(x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions) -> bool:
    """Whether `solve_on_host` takes the problem: a line, and few rows with points of their own.

    Any number of points for p = 1; for p = 2 so few that all entries of the kernel stay in memory.
    """
    rows_of_points = max(math.prod(x.shape[:-2]), math.prod(y.shape[:-2]))
    if not (
        x.shape[-1] == 1
        and options.backend in ("auto", "prefix")
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and rows_of_points <= _MOST_ROWS
    ):
        return False
    if options.p == 1:
        return True
    points = x.shape[-2] + (0 if y is x else y.shape[-2])
    rows = math.prod(broadcast_shapes(a.shape[:-1], b.shape[:-1])) if rows_of_points == 1 else 1
    used = rows * int(np.count_nonzero(b.numpy(), -1).max())
    return points * max(used, points) <= MOST_ENTRIES


def solve_on_host(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions, potentials: bool
) -> EntropicSolution:
    """Solve for points x (*, N, 1), y (*, M, 1) and weights a (*, N), b (*, M) of sum one.

    Both measures are put on the sorted points of either. Gradients in the points are as in
    `solve_entropic` and always found: they take no time beside the potentials. Without
    ``potentials`` these are 0 where b has no weight, and no gradient in the weights is returned.
    """
    if max(math.prod(x.shape[:-2]), math.prod(y.shape[:-2])) > 1:
        return _solve_row_by_row(x, y, a, b, options, potentials)
    line = _Line.of(x, y)
    lead = broadcast_shapes(x.shape[:-2], y.shape[:-2], a.shape[:-1], b.shape[:-1])
    one, other = line.spread(a, line.x), line.spread(b, line.y)
    every_a = one.reshape(1, -1) if one.size == line.z.size else stretch(one, lead)
    every_a = every_a.reshape(-1, line.z.size)
    every_b = stretch(other, lead).reshape(-1, line.z.size)
    solver: LineSolver | RaggedSolver
    if options.p == 1:
        solver = LineSolver(line.z, options)
    else:
        solver = RaggedSolver(line.z, options, potentials)
    between = solver.between(every_a, every_b)
    transport = line.rows(between.cost, lead)
    f, g = line.at(between.f, line.x, lead), line.at(between.g, line.y, lead)
    pull_x, pull_y = line.at(between.pull_x, line.x, lead), line.at(between.pull_y, line.y, lead)
    if not options.debias:
        slopes = (a * pull_x, b * pull_y, f, g)
        return EntropicSolution(
            transport, _slopes(slopes, potentials), transport, f, g, None, None, between.rounds
        )
    lead_a, lead_b = one.shape[:-1], other.shape[:-1]
    own_a, own_b = solver.within(one.reshape(-1, line.z.size), other.reshape(-1, line.z.size))
    cost = transport - 0.5 * line.rows(own_a.cost, lead_a) - 0.5 * line.rows(own_b.cost, lead_b)
    self_x, self_y = line.at(own_a.f, line.x, lead_a), line.at(own_b.f, line.y, lead_b)
    slopes = (
        a * (pull_x - line.at(own_a.pull, line.x, lead_a)),
        b * (pull_y - line.at(own_b.pull, line.y, lead_b)),
        f - self_x,
        g - self_y,
    )
    return EntropicSolution(
        cost, _slopes(slopes, potentials), transport, f, g, self_x, self_y, between.rounds
    )


def _solve_row_by_row(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions, potentials: bool
) -> EntropicSolution:
    """Solve rows that have points of their own."""
    lead = broadcast_shapes(x.shape[:-2], y.shape[:-2], a.shape[:-1], b.shape[:-1])
    rows_x, rows_y = (t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (x, y))
    rows_a, rows_b = (t.expand(*lead, -1).reshape(-1, t.shape[-1]) for t in (a, b))
    found = []
    for own_x, own_y, own_a, own_b in zip(rows_x, rows_y, rows_a, rows_b, strict=True):
        same = own_x if y is x else own_y
        found.append(solve_on_host(own_x, same, own_a, own_b, options, potentials))

    def stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
        there = [part for part in parts if part is not None]
        return torch.stack(there).view(*lead, *there[0].shape) if there else None

    cost, transport, f, g, f_self, g_self = (
        stacked([getattr(row, name) for row in found])
        for name in ("cost", "transport_cost", "f", "g", "f_self", "g_self")
    )
    assert cost is not None and transport is not None and f is not None and g is not None
    slopes = tuple(stacked(part) for part in zip(*(row.slopes for row in found), strict=True))
    rounds = max(row.rounds for row in found)
    return EntropicSolution(cost, cast(Slopes, slopes), transport, f, g, f_self, g_self, rounds)


class _Line(NamedTuple):
    """The sorted distinct points of both sides, and which of them each point is."""

    z: Array  # (K,)
    x: Array  # (N,) place of each point of x
    y: Array  # (M,)
    order: Array | None  # (K,) the points of x in order, where they are all there are

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> _Line:
        """Sort the points of both together."""
        own = x.detach().reshape(-1).numpy()
        points = own if y is x else np.concatenate([own, y.detach().reshape(-1).numpy()])
        order = points.argsort()
        z = points[order]
        new = z[1:] > z[:-1]
        place = np.empty_like(order)
        distinct = bool(new.all())
        if distinct:
            place[order] = np.arange(order.size)
        else:
            place[order] = np.concatenate([[0], np.add.accumulate(new)])
            z = z[np.concatenate([[True], new])]
        shared = y is x
        return cls(
            z, place if shared else place[: own.size], place if shared else place[own.size :],
            order if shared and distinct else None,
        )  # fmt: skip

    def spread(self, weights: Tensor, places: Array) -> Array:
        """Put weights (*, N) of points at these places on all of the line's, (*, K)."""
        values = weights.detach().numpy()
        if self.order is not None:
            return values.take(self.order, -1)
        spread = np.zeros((self.z.size, *values.shape[:-1]))
        np.add.at(spread, places, np.moveaxis(values, -1, 0))
        return np.moveaxis(spread, 0, -1)

    def at(self, values: Array, places: Array, lead: Shape) -> Tensor:
        """Read (R, K) at places (N,): (*lead, N)."""
        return torch.from_numpy(values.take(places, -1)).view(*lead, places.size)

    def rows(self, values: Array, lead: Shape) -> Tensor:
        """Return a number a row as (*lead)."""
        return torch.from_numpy(values).view(lead)


def _slopes(slopes: tuple[Tensor, Tensor, Tensor, Tensor], potentials: bool) -> Slopes:
    in_weights = slopes[2:] if potentials else (None, None)
    return slopes[0][..., None], slopes[1][..., None], *in_weights
