"""Which kernel and which solver; the divergence and its envelope gradients, put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .cpu_line import marginal_error_on_cpu, solve_on_cpu, solves_on_cpu
from .dense import DenseKernel
from .exact import exact_potentials
from .line import LaplaceLine, diffusion_loop
from .newton import fits_newton, newton
from .options import (
    Backend,
    EntropicSolution,
    Kernel,
    SinkhornOptions,
    broadcast_shapes,
    runs_triton,
    warn_unconverged,
)
from .sinkhorn_loop import LeadIn, Potentials, marginal_error, sinkhorn_loop, symmetric_loop
from .streamed import StreamedKernel

# On a line, by p: costs of one row up to which they are kept in memory for Newton's method, and of
# all rows. For p = 1 prefix sums follow sooner, though not as surely.
_MAX_COSTS_OF_A_ROW = {1: 96**2, 2: 512**2}
_MAX_COSTS_OF_ALL_ROWS = {1: 2**21, 2: 2**23}
# Alternating updates that go before Newton's method in space: most problems need fewer.
_ITERATIONS_BEFORE_NEWTON = 100


class _Side(NamedTuple):
    """One side of a solved problem: its potential, and the other side as a kernel sees it."""

    potential: Tensor  # (*, N)
    kernel: Kernel  # from these points to the other side's
    log_weights: Tensor  # (*, M) of the other side
    other: Tensor  # (*, M) potential of the other side


def solve_entropic(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions, wanted: Sequence[bool]
) -> EntropicSolution:
    """Solve for points x (*, N, D), y (*, M, D) and weights a (*, N), b (*, M) of sum one.

    ``wanted`` says which of the gradients in x, y, a and b to find. By the envelope theorem x_i
    moves by ``a_i (gradient towards b - gradient towards a itself)``, and the derivative in a is f
    less that of a itself, up to a constant that normalising the weights removes.
    """
    if solves_on_cpu(x, y, options):
        return solve_on_cpu(x, y, a, b, options, wanted[2] or wanted[3])
    log_a, log_b = a.log(), b.log()
    kernel = choose_kernel(x, y, a, b, options)
    f, g, iterations, _ = _solve_between(kernel, log_a, log_b, options)
    transport_cost = cost = (a * f).sum(-1) + (b * g).sum(-1)
    sides = [_Side(f, kernel, log_b, g), _Side(g, kernel.transposed, log_a, f)]
    selves: list[_Side | None] = [None, None]
    if options.debias:
        for k, (points, weights, logs) in enumerate(((x, a, log_a), (y, b, log_b))):
            kernel = choose_kernel(points, points, weights, weights, options)
            f_self, self_cost = symmetric_loop(kernel, logs, options, _lead_in(kernel, options))
            cost = cost - 0.5 * self_cost
            selves[k] = _Side(f_self, kernel, logs, f_self)
    slopes = [
        _points_slope(weights, side, own, options.epsilon) if want else None
        for want, weights, side, own in zip(wanted, (a, b), sides, selves, strict=False)
    ] + [
        side.potential - (0.0 if own is None else own.potential) if want else None
        for want, side, own in zip(wanted[2:], sides, selves, strict=True)
    ]
    own_f, own_g = (None if own is None else own.potential for own in selves)
    return EntropicSolution(
        cost, (slopes[0], slopes[1], slopes[2], slopes[3]), transport_cost, f, g, own_f, own_g,
        iterations,
    )  # fmt: skip


def entropic_marginal_error(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, options: SinkhornOptions
) -> Tensor:
    """Return the L1 error (*,) of both marginals, on all points, whatever stood for them."""
    epsilon = options.epsilon
    if options.p == 2 and solves_on_cpu(x, y, options):
        return marginal_error_on_cpu(x, y, a, b, f, g, epsilon)
    kernel = choose_kernel(x, y, a, b, options)
    error = marginal_error(a, f, kernel.softmin(epsilon, b.log(), g), epsilon)
    back = kernel.transposed.softmin(epsilon, a.log(), f)
    return error + marginal_error(b, g, back, epsilon)


def choose_kernel(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions
) -> DenseKernel | Kernel:
    """Return the kernel of ``options.backend``."""
    backend = options.backend
    if backend == "auto":
        lead = broadcast_shapes(x.shape[:-2], y.shape[:-2], a.shape[:-1], b.shape[:-1])
        backend = _automatic_backend(x, y, options.p, math.prod(lead))
    if backend == "prefix":
        return LaplaceLine(x, y)
    if backend == "triton":
        from .triton_softmin import TritonKernel  # here, since Triton is not everywhere

        return TritonKernel(x, y, options.p)
    return (DenseKernel if backend == "dense" else StreamedKernel)(x, y, options.p)


def _automatic_backend(x: Tensor, y: Tensor, p: int, rows: int) -> Backend:
    n, m = x.shape[-2], y.shape[-2]
    fused = x.is_cuda and runs_triton(x)
    if x.shape[-1] == 1:
        few = n * m <= _MAX_COSTS_OF_A_ROW[p] or rows * n * m <= _MAX_COSTS_OF_ALL_ROWS[p]
        if few and fits_newton(x, y):
            return "dense"
        if p == 1:
            return "prefix"
    elif not fused and DenseKernel.fits(n, m):
        return "dense"
    return "triton" if fused else "streamed"


def _solve_between(
    kernel: DenseKernel | Kernel, log_a: Tensor, log_b: Tensor, options: SinkhornOptions
) -> Potentials:
    """Solve ``OT_eps(a, b)``.

    The last update of one potential is a plain one, so ``<a, f> + <b, g>`` is a value of the dual:
    its error is of 2nd order in that of the potentials.
    """
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
        if dense is not None:
            most = min(most, _ITERATIONS_BEFORE_NEWTON)
        found = sinkhorn_loop(kernel, log_a, log_b, options, most, _lead_in(kernel, options))
        error, taken = found.marginal_error, found.iterations
        if dense is None or error is None or error <= options.tol:
            if error is not None and not error <= options.tol:
                warn_unconverged(error, options, taken)
            return found
    return newton(dense, log_a, log_b, options, None, taken)


def _lead_in(kernel: Kernel, options: SinkhornOptions) -> LeadIn | None:
    if not isinstance(kernel, StreamedKernel) or not options.can_read(kernel.x):
        return None
    return kernel.in_float32(options.epsilon)


def _points_slope(weights: Tensor, side: _Side, own: _Side | None, epsilon: float) -> Tensor:
    gradient = side.kernel.gradient(epsilon, side.log_weights, side.other)
    if own is not None:
        gradient = gradient - own.kernel.gradient(epsilon, own.log_weights, own.other)
    return gradient.mul_(weights[..., None])
