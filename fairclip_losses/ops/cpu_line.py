"""The entropic divergence on a line whose tensors lie on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .gauss_line import Measure, marginal_error, solve_between, solve_within
from .laplace_line import LaplaceLineSolver
from .line_newton import Array, Between, Within, join_rows
from .options import EntropicSolution, SinkhornOptions, broadcast_shapes

Shape = tuple[int, ...]


def solves_on_cpu(x: Tensor, y: Tensor, options: SinkhornOptions) -> bool:
    """Whether `solve_on_cpu` takes the problem."""
    return x.shape[-1] == 1 and options.backend in ("auto", "prefix") and x.is_cpu


def solve_on_cpu(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions, potentials: bool
) -> EntropicSolution:
    """Solve for points x (*, N, 1), y (*, M, 1) and weights a (*, N), b (*, M) of sum one.

    Without ``potentials`` these are 0 where there is no weight, and no gradient in the weights is
    returned.
    """
    lead_a = broadcast_shapes(x.shape[:-2], a.shape[:-1])
    lead_b = broadcast_shapes(y.shape[:-2], b.shape[:-1])
    lead = broadcast_shapes(lead_a, lead_b)
    own = None
    if options.p == 2:
        one, other = _measures(x, a, lead_a), _measures(y, b, lead_b)
        pairs = zip(_expand(one, lead_a, lead), _expand(other, lead_b, lead), strict=True)
        between = join_rows([solve_between(*pair, options, potentials) for pair in pairs])
        if options.debias:  # a measure that rows share is solved against itself once
            within = [[solve_within(row, options, potentials) for row in s] for s in (one, other)]
            own = join_rows(within[0]), join_rows(within[1])
    elif x.shape[:-2].numel() == y.shape[:-2].numel() == 1:
        (points,) = _rows(x[..., 0], ())
        line = LaplaceLineSolver(points, points if y is x else _rows(y[..., 0], ())[0], options)
        rows_a = _rows(a, lead_a if math.prod(lead_a) == 1 else lead)
        between = line.between(rows_a, _rows(b, lead))
        if options.debias:
            own = line.within(_rows(a, lead_a), _rows(b, lead_b))
    else:
        lead_a = lead_b = lead
        rows = [_rows(part, lead) for part in (x[..., 0], y[..., 0], a, b)]
        lines = [
            LaplaceLineSolver(one, other, options) for one, other in zip(*rows[:2], strict=True)
        ]
        weighted = [(line, u[None], v[None]) for line, u, v in zip(lines, *rows[2:], strict=True)]
        between = join_rows([line.between(u, v) for line, u, v in weighted])
        if options.debias:
            both = [line.within(u, v) for line, u, v in weighted]
            own = join_rows([pair[0] for pair in both]), join_rows([pair[1] for pair in both])
    return _assemble(a, b, (lead_a, lead_b, lead), between, own, potentials)


def _assemble(
    a: Tensor, b: Tensor, leads: tuple[Shape, Shape, Shape], between: Between,
    own: tuple[Within, Within] | None, potentials: bool,
) -> EntropicSolution:  # fmt: skip
    """Put the divergence together; ``leads`` are the rows of a, of b and of both."""

    def tensors(values: Sequence[Array], lead: Shape) -> list[Tensor]:
        return [torch.from_numpy(part).view((*lead, *part.shape[1:])) for part in values]

    cost, f, g, grad_x, grad_y = tensors(between[:5], leads[2])
    transport_cost, in_a, in_b, f_self, g_self = cost, f, g, None, None
    if own is not None:
        cost_a, f_self, self_x = tensors(own[0], leads[0])
        cost_b, g_self, self_y = tensors(own[1], leads[1])
        cost = cost - 0.5 * cost_a - 0.5 * cost_b
        in_a, in_b, grad_x, grad_y = f - f_self, g - g_self, grad_x - self_x, grad_y - self_y
    in_points = (a * grad_x)[..., None], (b * grad_y)[..., None]
    slopes = (*in_points, *((in_a, in_b) if potentials else (None, None)))
    return EntropicSolution(cost, slopes, transport_cost, f, g, f_self, g_self, between.iterations)


def marginal_error_on_cpu(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: float
) -> Tensor:
    """Return the L1 error (*,) of both marginals on all points, for p = 2 and potentials (*, N)."""
    lead = f.shape[:-1]
    sides = _measures(x, a, lead), _measures(y, b, lead)
    rows = zip(*sides, _rows(f, lead), _rows(g, lead), strict=True)
    error = [marginal_error(*row, epsilon) for row in rows]
    return torch.tensor(error, dtype=torch.float64).view(lead)


def _rows(values: Tensor, lead: Shape) -> Array:
    """Return values (*, N) of the rows to which they broadcast, (R, N)."""
    n = values.shape[-1]
    if values.numel() == n:
        values = values.reshape(n)
    return values.detach().expand(*lead, n).reshape(-1, n).numpy()


def _measures(points: Tensor, weights: Tensor, lead: Shape) -> list[Measure]:
    """Return the measure of each row: points (*, N, 1), weights (*, N)."""
    rows = zip(_rows(points[..., 0], lead), _rows(weights, lead), strict=True)
    return [Measure(*row) for row in rows]


def _expand(measures: list[Measure], own: Shape, lead: Shape) -> list[Measure]:
    """Return the measure of each of the rows to which they broadcast."""
    which = np.broadcast_to(np.arange(len(measures)).reshape(own), lead).reshape(-1)
    return [measures[k] for k in which]
