"""The entropic divergence on a line whose tensors lie on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..checks import broadcast_shapes
from ..gauss_line import Measure, marginal_error, solve_between, solve_within
from ..laplace_line import LaplaceLine
from ..line_newton import Between, Within
from ..options import SinkhornOptions
from ..solution import EntropicSolution, Slopes
from .arrays import Array, Shape, stretch

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
    rows_f, rows_g = (part.reshape(-1, part.shape[-1]).numpy() for part in (f, g))
    rows = zip(_measures(x, a, lead), _measures(y, b, lead), rows_f, rows_g, strict=True)
    error = [marginal_error(*row, epsilon) for row in rows]
    return torch.tensor(error, dtype=torch.float64).view(lead)


def _rows_of_points(x: Tensor, y: Tensor) -> int:
    return max(math.prod(x.shape[:-2]), math.prod(y.shape[:-2]))


def _solve_smooth(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions, potentials: bool
) -> EntropicSolution:
    """Solve p = 2, row by row; a measure that rows share is solved against itself once."""
    lead_a = broadcast_shapes(x.shape[:-2], a.shape[:-1])
    lead_b = broadcast_shapes(y.shape[:-2], b.shape[:-1])
    lead = broadcast_shapes(lead_a, lead_b)
    sides = _measures(x, a, lead_a), _measures(y, b, lead_b)
    pairs = zip(_rows(sides[0], lead_a, lead), _rows(sides[1], lead_b, lead), strict=True)
    found = [solve_between(one, other, options, potentials) for one, other in pairs]
    iterations = max(row.iterations for row in found)
    cost, f, g, grad_x, grad_y = _stacked([row[:5] for row in found])
    between = Between(cost, f, g, grad_x, grad_y, iterations)
    own = None
    if options.debias:
        own_a, own_b = (
            _stacked([solve_within(measure, options, potentials) for measure in side])
            for side in sides
        )
        own = Within(*own_a), Within(*own_b)
    return _assemble(a, b, (lead_a, lead_b, lead), between, own, potentials)


def _stacked(rows: Sequence[tuple[Array, ...]]) -> list[Array]:
    return [np.concatenate(part) for part in zip(*rows, strict=True)]


def _measures(points: Tensor, weights: Tensor, lead: Shape) -> list[Measure]:
    """Return the measure of each row: points (*, N, 1), weights (*, N)."""
    n = weights.shape[-1]
    rows = (t.detach().expand(*lead, n).reshape(-1, n).numpy() for t in (points[..., 0], weights))
    return [Measure(*row) for row in zip(*rows, strict=True)]


def _rows(measures: list[Measure], own: Shape, lead: Shape) -> list[Measure]:
    """Return the measure of each of the rows to which they broadcast."""
    which = np.broadcast_to(np.arange(len(measures)).reshape(own), lead).reshape(-1)
    return [measures[k] for k in which]


def _solve_on_one_line(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions, potentials: bool
) -> EntropicSolution:
    """Solve p = 1 where all rows share their points."""
    lead_a, lead_b = a.shape[:-1], b.shape[:-1]
    lead = broadcast_shapes(x.shape[:-2], y.shape[:-2], lead_a, lead_b)
    points = x.detach().reshape(-1).numpy()
    others = points if y is x else y.detach().reshape(-1).numpy()
    one, other = a.detach().numpy(), b.detach().numpy()
    line = LaplaceLine(points, others, options)
    rows_a = one if math.prod(lead_a) == 1 else stretch(one, lead)
    rows_b = stretch(other, lead)
    found = line.between(rows_a.reshape(-1, one.shape[-1]), rows_b.reshape(-1, other.shape[-1]))
    own = None
    if options.debias:
        own = line.within(one.reshape(-1, one.shape[-1]), other.reshape(-1, other.shape[-1]))
    return _assemble(a, b, (lead_a, lead_b, lead), found, own, potentials)


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
        return EntropicSolution(transport, slopes, transport, f, g, None, None, between.iterations)
    cost_a, self_x, self_pull_x = (tensor(part, leads[0]) for part in own[0])
    cost_b, self_y, self_pull_y = (tensor(part, leads[1]) for part in own[1])
    cost = transport - 0.5 * cost_a - 0.5 * cost_b
    in_weights = (f - self_x, g - self_y) if potentials else (None, None)
    in_x, in_y = a * (pull_x - self_pull_x), b * (pull_y - self_pull_y)
    return EntropicSolution(
        cost, (in_x[..., None], in_y[..., None], *in_weights), transport, f, g, self_x, self_y,
        between.iterations,
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
    rounds = max(row.rounds for row in found)
    return EntropicSolution(cost, cast(Slopes, slopes), transport, f, g, f_self, g_self, rounds)
