"""The entropic divergence on a line whose tensors lie on the CPU."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..checks import broadcast_shapes
from ..gauss_line import Measure, marginal_error, solve_between, solve_within
from ..laplace_line import LaplaceLineSolver
from ..line_newton import Between, Within, join_rows
from ..options import SinkhornOptions
from ..solution import EntropicSolution
from .arrays import Array, Shape

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
    return _solve_laplace(x, y, a, b, options, potentials)


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
    one, other = _measures(x, a, lead_a), _measures(y, b, lead_b)
    pairs = (
        np.broadcast_to(np.arange(len(side)).reshape(own), lead).reshape(-1)
        for side, own in ((one, lead_a), (other, lead_b))
    )
    between = join_rows(
        [solve_between(one[i], other[j], options, potentials) for i, j in zip(*pairs, strict=True)]
    )
    own = None
    if options.debias:
        own_x, own_y = (
            join_rows([solve_within(row, options, potentials) for row in side])
            for side in (one, other)
        )
        own = own_x, own_y
    return _assemble(a, b, (lead_a, lead_b, lead), between, own, potentials)


def _measures(points: Tensor, weights: Tensor, lead: Shape) -> list[Measure]:
    """Return the measure of each row: points (*, N, 1), weights (*, N)."""
    rows = zip(_rows(points[..., 0], lead), _rows(weights, lead), strict=True)
    return [Measure(*row) for row in rows]


def _solve_laplace(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions, potentials: bool
) -> EntropicSolution:
    """Solve p = 1: all rows on one line, or each on the line of its own points."""
    lead = broadcast_shapes(x.shape[:-2], y.shape[:-2], a.shape[:-1], b.shape[:-1])
    is_shared = _rows_of_points(x, y) == 1
    lead_a, lead_b = (a.shape[:-1], b.shape[:-1]) if is_shared else (lead, lead)
    points_x, points_y = (
        t.detach().reshape(1, -1).numpy() if is_shared else _rows(t[..., 0], lead) for t in (x, y)
    )
    own_a, own_b = _rows(a, lead_a), _rows(b, lead_b)
    every_a = own_a if len(own_a) == 1 else _rows(a, lead)
    every_b = _rows(b, lead)
    between, within = [], []
    for k, own_x in enumerate(points_x):
        rows = slice(None) if is_shared else slice(k, k + 1)
        line = LaplaceLineSolver(own_x, own_x if y is x else points_y[k], options)
        between.append(line.between(every_a[rows], every_b[rows]))
        if options.debias:
            within.append(line.within(own_a[rows], own_b[rows]))
    one, other = zip(*within, strict=True) if within else ((), ())
    own = (join_rows(list(one)), join_rows(list(other))) if within else None
    return _assemble(a, b, (lead_a, lead_b, lead), join_rows(between), own, potentials)


def _rows(values: Tensor, lead: Shape) -> Array:
    """Return values (*, N) as rows (R, N) of the leading dimensions."""
    count = values.shape[-1]
    rows: Array = values.detach().expand(*lead, count).reshape(-1, count).numpy()
    return rows


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
