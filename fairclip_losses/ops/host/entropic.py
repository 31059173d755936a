"""The entropic divergence on a line whose tensors lie on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ..options import EntropicSolution, SinkhornOptions, Slopes, broadcast_shapes
from .arrays import Array, Shape, stretch
from .gauss.rows import Rows, clouds, within_blocks
from .gauss.solver import SmoothSolver, marginal_error
from .host_solver import Between, Within
from .laplace.solver import LineSolver

# Most rows with points of their own for p = 1 that are solved one after the other where they have
# so few points.
_MOST_ROWS, _FEW = 64, 96


def suits_host_solver(x: Tensor, y: Tensor, options: SinkhornOptions) -> bool:
    """Whether `solve_on_host` takes the problem: a line, but for p = 1 and many rows of few points.

    Those are faster, and as sure, all at once with their costs in memory.
    """
    sizes = x.shape[-2], y.shape[-2]
    return (
        x.shape[-1] == 1
        and options.backend in ("auto", "prefix")
        and x.is_cpu
        and (options.p == 2 or _rows_of_points(x, y) <= _MOST_ROWS or max(sizes) > _FEW)
    )


def solve_on_host(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions, potentials: bool
) -> EntropicSolution:
    """Solve for points x (*, N, 1), y (*, M, 1) and weights a (*, N), b (*, M) of sum one.

    Gradients in the points are as in `solve_entropic` and always found: they take no time beside
    the potentials. Without ``potentials`` these are 0 where there is no weight, and no gradient in
    the weights is returned.
    """
    if options.p == 2:
        return _solve_smooth(x, y, a, b, options, potentials)
    if _rows_of_points(x, y) > 1:
        return _solve_row_by_row(x, y, a, b, options, potentials)
    return _solve_on_one_line(x, y, a, b, options, potentials)


def marginal_error_on_host(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: float
) -> Tensor:
    """Return the L1 error (*,) of both marginals on all points, for p = 2 and potentials (*, N)."""
    lead = f.shape[:-1]
    one, other = Rows.of(x, a, lead), Rows.of(y, b, lead)
    rows_f, rows_g = f.reshape(-1, f.shape[-1]).numpy(), g.reshape(-1, g.shape[-1]).numpy()
    error = [
        marginal_error(ones, others, rows_f[rows], rows_g[rows], epsilon)
        + marginal_error(others, ones, rows_g[rows], rows_f[rows], epsilon)
        for rows, ones, others in clouds(one, other)
    ]
    return torch.from_numpy(np.concatenate(error)).view(lead)


def _rows_of_points(x: Tensor, y: Tensor) -> int:
    return max(math.prod(x.shape[:-2]), math.prod(y.shape[:-2]))


def _solve_smooth(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions, potentials: bool
) -> EntropicSolution:
    """Solve p = 2, each row between points of its own."""
    solver = SmoothSolver(options, potentials)
    lead_a = broadcast_shapes(x.shape[:-2], a.shape[:-1])
    lead_b = broadcast_shapes(y.shape[:-2], b.shape[:-1])
    lead = broadcast_shapes(lead_a, lead_b)
    one, other = Rows.of(x, a, lead), Rows.of(y, b, lead)
    between = Between.join([solver.between(ones, others) for _, ones, others in clouds(one, other)])
    own = None
    if options.debias:
        if lead_a != lead:
            one = Rows.of(x, a, lead_a)
        if lead_b != lead:
            other = Rows.of(y, b, lead_b)
        own = within_blocks(solver, one, other)
    return _assemble(a, b, (lead_a, lead_b, lead), between, own, potentials)


def _solve_on_one_line(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions, potentials: bool
) -> EntropicSolution:
    """Solve p = 1 on the sorted points of either measure."""
    line = _Line.of(x, y)
    lead = broadcast_shapes(x.shape[:-2], y.shape[:-2], a.shape[:-1], b.shape[:-1])
    one, other = line.spread(a, line.x), line.spread(b, line.y)
    every_a = one.reshape(1, -1) if one.size == line.z.size else stretch(one, lead)
    every_a = every_a.reshape(-1, line.z.size)
    every_b = stretch(other, lead).reshape(-1, line.z.size)
    solver = LineSolver(line.z, options)
    between = line.read_between(solver.between(every_a, every_b))
    own = None
    if options.debias:
        within = solver.within(one.reshape(-1, line.z.size), other.reshape(-1, line.z.size))
        own = line.read_within(within[0], line.x), line.read_within(within[1], line.y)
        del within  # as large as all that follows
    leads = one.shape[:-1], other.shape[:-1], lead
    return _assemble(a, b, leads, between, own, potentials)


def _assemble(
    a: Tensor, b: Tensor, leads: tuple[Shape, Shape, Shape], between: Between,
    own: tuple[Within, Within] | None, potentials: bool,
) -> EntropicSolution:  # fmt: skip
    """Put the divergence together; ``leads`` are the rows of a, of b and of both."""

    def tensor(values: Array, lead: Shape) -> Tensor:
        return torch.from_numpy(values).view((*lead, *values.shape[1:]))

    lead = leads[2]
    transport, f, g, pull_x, pull_y = (tensor(part, lead) for part in between[:5])
    if own is None:
        in_weights = (f, g) if potentials else (None, None)
        slopes = ((a * pull_x)[..., None], (b * pull_y)[..., None], *in_weights)
        return EntropicSolution(transport, slopes, transport, f, g, None, None, between.rounds)
    cost_a, self_x, self_pull_x = (tensor(part, leads[0]) for part in own[0])
    cost_b, self_y, self_pull_y = (tensor(part, leads[1]) for part in own[1])
    cost = transport - 0.5 * cost_a - 0.5 * cost_b
    in_weights = (f - self_x, g - self_y) if potentials else (None, None)
    in_x, in_y = a * (pull_x - self_pull_x), b * (pull_y - self_pull_y)
    return EntropicSolution(
        cost, (in_x[..., None], in_y[..., None], *in_weights), transport, f, g, self_x, self_y,
        between.rounds,
    )  # fmt: skip


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
    rounds = max(row.iterations for row in found)
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
        spread = np.zeros((*values.shape[:-1], self.z.size))
        rows = values.reshape(-1, places.size)
        for row, own in zip(spread.reshape(-1, self.z.size), rows, strict=True):
            row[:] = np.bincount(places, own, self.z.size)
        return spread

    def read_between(self, found: Between) -> Between:
        """Read at the points of x and y what was found on the line."""
        f, pull_x = (part.take(self.x, -1) for part in (found.f, found.pull_x))
        g, pull_y = (part.take(self.y, -1) for part in (found.g, found.pull_y))
        return Between(found.cost, f, g, pull_x, pull_y, found.rounds)

    def read_within(self, found: Within, places: Array) -> Within:
        """Read at points at these places what was found on the line."""
        return Within(found.cost, found.f.take(places, -1), found.pull.take(places, -1))
