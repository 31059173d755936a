"""The entropic divergence and its gradients, put together from up to three problems."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .host import solve_on_host, suits_host_solver
from .kernels.streamed import StreamedKernel
from .options import SinkhornOptions
from .problem import Measure, Side, solve_between, solve_within
from .solution import EntropicSolution

# Largest estimate of what rounding makes of a gradient in float32, relative to it.
_LOST = 1e-5


def solve_entropic(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions, wanted: Sequence[bool],
    single: bool = False,
) -> EntropicSolution:  # fmt: skip
    """Solve for points x (*, N, D), y (*, M, D) and weights a (*, N), b (*, M) of sum one.

    With ``single``, gradients in the points need the digits of float32 only.

    Envelope theorem: x_i moves by ``a_i (pull towards b - pull towards a itself)``, and the
    derivative in a is f, up to a constant that normalising the weights removes.
    """
    potentials = wanted[2] or wanted[3]
    if suits_host_solver(x, y, options) and not torch.compiler.is_compiling():
        return solve_on_host(x, y, a, b, options, potentials)
    one, other = Measure(x, a), Measure(y, b)
    between = solve_between(one, other, options)
    side_a, side_b, cost = between.side_a, between.side_b, between.cost
    self_a = self_b = None
    if options.debias:
        self_a, cost_a = solve_within(one, options)
        self_b, cost_b = solve_within(other, options)
        cost = cost - 0.5 * cost_a - 0.5 * cost_b
    return EntropicSolution(
        cost,
        (
            _points_slope(a, side_a, self_a, options, single) if wanted[0] else None,
            _points_slope(b, side_b, self_b, options, single) if wanted[1] else None,
            _weights_slope(side_a, self_a) if wanted[2] else None,
            _weights_slope(side_b, self_b) if wanted[3] else None,
        ),
        between.cost,
        side_a.potential,
        side_b.potential,
        None if self_a is None else self_a.potential,
        None if self_b is None else self_b.potential,
        between.rounds,
    )


def _points_slope(
    weights: Tensor, side: Side, own: Side | None, options: SinkhornOptions, single: bool
) -> Tensor:
    slope = _slope_in_single(weights, side, own, options.epsilon) if single else None
    if slope is None:
        less = None if own is None else own.pull(options.epsilon)
        slope = side.pull(options.epsilon, less).mul_(weights[..., None])
    return slope


def _slope_in_single(
    weights: Tensor, side: Side, own: Side | None, epsilon: float
) -> Tensor | None:
    """Return `_points_slope` of blocks in float32, or None where their rounding may show in it."""
    slope, lost = None, torch.zeros_like(weights)
    for each in (side,) if own is None else (own, side):
        kernel = each.kernel.single(epsilon) if isinstance(each.kernel, StreamedKernel) else None
        if kernel is None:
            return None
        slope, error = kernel.pull_and_error(epsilon, each.log_weights, each.other, slope)
        lost = lost + (weights * error).square()
    assert slope is not None  # there is a side
    slope.mul_(weights.to(slope.dtype)[..., None])
    known = lost.sum(-1).sqrt() <= _LOST * torch.linalg.matrix_norm(slope)
    return slope if bool(known.all()) else None


def _weights_slope(side: Side, own: Side | None) -> Tensor:
    return side.potential if own is None else side.potential - own.potential
