"""The exact optimal transport cost on a line in NumPy: what `ops/exact.py` computes, on the CPU.

There the time of a training batch is that of calls, not of numbers, and NumPy's take a third of
torch's; its sort is several times as fast.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ...options import broadcast_shapes
from ..arrays import FEW, FEW_STEPS, Array, HostSolution
from .distribution import solve_by_distribution_functions
from .inputs import Weights, read_points, read_weights
from .merge import solve_by_merged_levels
from .quantiles import solve_by_quantiles


def solve_exact_on_host(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, *, p: int, validate: bool
) -> HostSolution:
    """Solve ``min_P sum_ij P_ij |x_i - y_j|^p / p`` for every row of weights.

    Shapes are those of `sinkhorn_divergence` with D = 1: x (*, N, 1), y (*, M, 1), a (*, N),
    b (*, M); a row of weights without mass costs 0. ``gradients`` adds the gradients of rows that
    share their points, and where y is x all of it is in the first. Both may overflow, or meet NaN
    where they need not ``validate``: NumPy's warnings are for the caller to silence.

    Raises:
        ValueError: where ``validate``, for what `check_finite` and `check_weights` refuse.
    """
    points_x, huge = read_points(x, (a, b) if y is x else (a,), "x", validate)
    points_y = points_x
    if y is not x:
        points_y, huge_y = read_points(y, (b,), "y", validate)
        huge = huge or huge_y
    weights_a, weights_b = read_weights(a, "a", validate), read_weights(b, "b", validate)
    solve = _solve_in_units if huge else _solve
    return solve(points_x, points_y, weights_a, weights_b, p)


def _solve(x: Array, y: Array, a: Weights, b: Weights, p: int) -> HostSolution:
    lead = broadcast_shapes(x.shape[:-1], y.shape[:-1], a.total.shape, b.total.shape)
    rows = math.prod(lead)
    few_steps = FEW if a.full and b.full else FEW_STEPS
    if p == 2 and rows * (x.shape[-1] + y.shape[-1]) <= few_steps:
        return solve_by_merged_levels(x, y, a, b, lead)
    # For p = 1 quantiles are of one row of x.
    if p == 1 and (x.ndim > 1 or a.total.ndim > 0 or rows * x.shape[-1] <= FEW):
        return solve_by_distribution_functions(x, y, a, b, lead)
    return solve_by_quantiles(x, y, a, b, p)


def _solve_in_units(x: Array, y: Array, a: Weights, b: Weights, p: int) -> HostSolution:
    """Solve where squares would overflow: in units of the largest."""
    unit = max(np.abs(x).max(), np.abs(y).max())
    small = x / unit
    solution = _solve(small, small if y is x else y / unit, a, b, p)

    def gradients(grad: Array) -> tuple[Array, Array]:
        by_x, by_y = solution.gradients(grad)
        return by_x * unit ** (p - 1), by_y * unit ** (p - 1)

    return HostSolution(np.asarray(solution.cost * unit * (unit if p == 2 else 1.0)), gradients)
