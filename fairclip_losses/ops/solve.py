"""Which kernel and which solver; the divergence and its envelope gradients, put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..validation import broadcast_shapes, is_readable
from .dense import DenseKernel, fits_newton, newton
from .exact import exact_potentials
from .gauss_cells import Measure
from .gauss_line import marginal_error as gauss_marginal_error
from .gauss_line import solve_between, solve_within
from .laplace_line import LaplaceLineSolver
from .line import LaplaceLine, diffusion_loop
from .line_newton import Array, Between, Within, join_rows
from .options import Kernel, SinkhornOptions, runs_triton, warn_unconverged
from .sinkhorn_loop import Potentials, marginal_error, sinkhorn_loop, symmetric_loop
from .streamed import StreamedKernel

Shape = tuple[int, ...]
# Most costs kept in memory for D > 1: 2 MiB in float64, as much as a processor's own cache.
_MAX_COSTS_IN_SPACE = 512**2
# On a line, by p: costs of one row up to which they are kept in memory for Newton's method, and of
# all rows. For p = 1 prefix sums follow sooner, though not as surely.
_MAX_COSTS_OF_A_ROW = {1: 96**2, 2: 512**2}
_MAX_COSTS_OF_ALL_ROWS = {1: 2**21, 2: 2**23}
# Rows with points of their own that are solved one after the other where they have so few points.
_MAX_ROWS_OF_FEW, _FEW_POINTS = 64, 96
# Alternating updates that go before Newton's method in space: most problems need fewer.
_ITERATIONS_BEFORE_NEWTON = 100


@dataclass(frozen=True)
class Solution:
    """A solved divergence, in the working precision."""

    cost: Tensor  # (*,) the divergence
    transport_cost: Tensor  # (*,) OT_eps(a, b), not debiased
    f: Tensor  # (*, N) potentials between a and b
    g: Tensor  # (*, M)
    f_self: Tensor | None  # (*, N) potential of OT_eps(a, a), None without debiasing
    g_self: Tensor | None  # (*, M)
    iterations: int  # taken between a and b


# Derivatives of a row's divergence in x, y, a and b; None where not wanted.
Slopes = Sequence[Tensor | None]


def solve_entropic(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions, wanted: Sequence[bool]
) -> tuple[Solution, Slopes]:
    """Solve for points x (*, N, D), y (*, M, D) and weights a (*, N), b (*, M) of sum one.

    ``wanted`` says which of the gradients in x, y, a and b to find. By the envelope theorem x_i
    moves by ``a_i (gradient towards b - gradient towards a itself)``, and the derivative in a is f
    less that of a itself, up to a constant that normalising the weights removes.
    """
    if solves_on_cpu(x, y, options):
        return solve_on_cpu(x, y, a, b, options, wanted[2] or wanted[3])
    log_a, log_b, epsilon = a.log(), b.log(), options.epsilon
    between = choose_kernel(x, y, a, b, options)
    f, g, iterations, _ = _solve_between(between, log_a, log_b, options)
    transport_cost = cost = (a * f).sum(-1) + (b * g).sum(-1)
    slopes: list[Tensor | None] = [None] * 4
    selves: list[Tensor | None] = [None] * 2
    for k, (kernel, points, weights, logs, in_weights, other_logs, other) in enumerate(
        ((between, x, a, log_a, f, log_b, g), (between.transposed, y, b, log_b, g, log_a, f))
    ):
        in_points = kernel.gradient(epsilon, other_logs, other) if wanted[k] else None
        if options.debias:
            kernel = choose_kernel(points, points, weights, weights, options)
            own, own_cost = symmetric_loop(kernel, logs, options)
            cost, in_weights, selves[k] = cost - 0.5 * own_cost, in_weights - own, own
            if in_points is not None:
                in_points = in_points - kernel.gradient(epsilon, logs, own)
        slopes[k] = None if in_points is None else in_points.mul_(weights[..., None])
        slopes[k + 2] = in_weights if wanted[k + 2] else None
    own_f, own_g = selves
    return Solution(cost, transport_cost, f, g, own_f, own_g, iterations), slopes


def entropic_marginal_error(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, options: SinkhornOptions
) -> Tensor:
    """Return the L1 error (*,) of both marginals, on all points, whatever stood for them."""
    epsilon = options.epsilon
    if options.p == 2 and solves_on_cpu(x, y, options):
        lead = f.shape[:-1]
        sides = _measures(x, a, lead), _measures(y, b, lead)
        rows = zip(*sides, _rows(f, lead), _rows(g, lead), strict=True)
        errors = [gauss_marginal_error(*row, epsilon) for row in rows]
        return torch.tensor(errors, dtype=torch.float64).view(lead)
    kernel = choose_kernel(x, y, a, b, options)
    error = marginal_error(a, f, kernel.softmin(epsilon, b.log(), g), epsilon)
    back = kernel.transposed.softmin(epsilon, a.log(), f)
    return error + marginal_error(b, g, back, epsilon)


def choose_kernel(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions
) -> DenseKernel | Kernel:
    """Return the kernel of ``options.backend``."""
    backend, p, costs = options.backend, options.p, x.shape[-2] * y.shape[-2]
    if backend == "auto":
        fused = x.is_cuda and runs_triton(x)
        backend = "triton" if fused else "streamed"
        if x.shape[-1] == 1:
            lead = broadcast_shapes(x.shape[:-2], y.shape[:-2], a.shape[:-1], b.shape[:-1])
            few = (
                costs <= _MAX_COSTS_OF_A_ROW[p] or lead.numel() * costs <= _MAX_COSTS_OF_ALL_ROWS[p]
            )
            if few and fits_newton(x, y):
                backend = "dense"
            elif p == 1:
                backend = "prefix"
        elif not fused and costs <= _MAX_COSTS_IN_SPACE:
            backend = "dense"
    if backend == "prefix":
        return LaplaceLine(x, y)
    if backend == "triton":
        from .triton_softmin import TritonKernel  # here, since Triton is not everywhere

        return TritonKernel(x, y, p)
    return (DenseKernel if backend == "dense" else StreamedKernel)(x, y, p)


def _solve_between(
    kernel: DenseKernel | Kernel, log_a: Tensor, log_b: Tensor, options: SinkhornOptions
) -> Potentials:
    """Solve ``OT_eps(a, b)``; the last update is a plain one, so that the cost is a dual value."""
    x, y = kernel.x, kernel.y
    dense = kernel if isinstance(kernel, DenseKernel) and fits_newton(x, y) else None
    if x.shape[-1] == 1:
        _, g = exact_potentials(x[..., 0], y[..., 0], log_a.exp(), log_b.exp(), options.p)
        g = g.to(x.dtype)
        if dense is None:
            return diffusion_loop(kernel, log_a, log_b, options, g)
        return newton(dense, log_a, log_b, options, g)
    watched, taken = options.is_watched(x), 0
    if dense is None or watched or options.iterations is not None:
        most = options.max_iterations
        most = most if dense is None else min(most, _ITERATIONS_BEFORE_NEWTON)
        found = sinkhorn_loop(kernel, log_a, log_b, options, most)
        error, taken = found.marginal_error, found.iterations
        if dense is None or error is None or error <= options.tol:
            warn_unconverged(error, options, taken)
            return found
    return newton(dense, log_a, log_b, options, None, taken)


def solves_on_cpu(x: Tensor, y: Tensor, options: SinkhornOptions) -> bool:
    """Whether `solve_on_cpu` takes the problem: a line, but for p = 1 few rows or many points."""
    if x.shape[-1] > 1 or not is_readable(x) or options.backend not in ("auto", "prefix"):
        return False
    rows = max(x.shape[:-2].numel(), y.shape[:-2].numel())
    return options.p == 2 or rows <= _MAX_ROWS_OF_FEW or max(x.shape[-2], y.shape[-2]) > _FEW_POINTS


def solve_on_cpu(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions, potentials: bool
) -> tuple[Solution, Slopes]:
    """See `solve_entropic`; without ``potentials`` these are 0 where there is no weight."""
    lead_a = broadcast_shapes(x.shape[:-2], a.shape[:-1])
    lead_b = broadcast_shapes(y.shape[:-2], b.shape[:-1])
    lead = broadcast_shapes(lead_a, lead_b)
    own = None
    if options.p == 2:
        one, other = _measures(x, a, lead_a), _measures(y, b, lead_b)
        which = (np.arange(len(s)).reshape(own) for s, own in ((one, lead_a), (other, lead_b)))
        pairs = zip(*(np.broadcast_to(each, lead).flat for each in which), strict=True)
        between = join_rows(
            [solve_between(one[i], other[j], options, potentials) for i, j in pairs]
        )
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
        rows = zip(*(_rows(part, lead) for part in (x[..., 0], y[..., 0], a, b)), strict=True)
        weighted = [
            (LaplaceLineSolver(one, other, options), u[None], v[None]) for one, other, u, v in rows
        ]
        between = join_rows([line.between(u, v) for line, u, v in weighted])
        if options.debias:
            both = [line.within(u, v) for line, u, v in weighted]
            own = join_rows([pair[0] for pair in both]), join_rows([pair[1] for pair in both])
    return _assemble(a, b, (lead_a, lead_b, lead), between, own, potentials)


def _assemble(
    a: Tensor, b: Tensor, leads: tuple[Shape, Shape, Shape], between: Between,
    own: tuple[Within, Within] | None, potentials: bool,
) -> tuple[Solution, Slopes]:  # fmt: skip
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
    slopes = [*in_points, *((in_a, in_b) if potentials else (None, None))]
    return Solution(cost, transport_cost, f, g, f_self, g_self, between.iterations), slopes


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
