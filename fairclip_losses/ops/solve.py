"""The potentials of one entropic problem: where to start and which method to go on with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from .alternate import alternate
from .dense import DenseKernel
from .diffusion import diffusion_rounds
from .exact import solve_exact
from .line import LaplaceLine
from .newton import fits_newton, newton_pair, newton_pair_annealed, newton_self
from .options import SinkhornOptions
from .streamed import StreamedKernel

# Rounds of a self-term where nothing may be read back from the device.
_UNWATCHED_ROUNDS = 40
# Rough rounds of a self-term at most, and the marginal error that ends them before.
_QUICK_ROUNDS, _QUICK_TOL = 10, 1e-4
# Step and memory of the heavy ball for a linear map with eigenvalues in [1, 2].
_BALL_STEP, _BALL_MEMORY = 0.686, 0.0294
if TYPE_CHECKING:
    from .triton_kernel import TritonKernel

Kernel: TypeAlias = "DenseKernel | LaplaceLine | StreamedKernel | TritonKernel"


def _exact_potential(x: Tensor, y: Tensor, a: Tensor, b: Tensor, p: int) -> Tensor:
    """Return a Kantorovich potential of b, in the middle of what the ties of the plan leave free.

    Where a level of one measure meets one of the other's, the walk along the plan picks an extreme
    potential, and the opposite one once the measures are exchanged.
    """
    there = solve_exact(x[..., 0], y[..., 0], a, b, p=p, same_points=False, potentials=True)
    back = solve_exact(y[..., 0], x[..., 0], b, a, p=p, same_points=False, potentials=True)
    assert there.g is not None and back.f is not None  # asked for
    one, other = there.g, back.f
    weights = b.to(one.dtype)
    level = (weights * (one - other)).sum(-1, keepdim=True)
    return 0.5 * (one + other + level)


def solve_pair(
    kernel: Kernel, log_a: Tensor, log_b: Tensor, options: SinkhornOptions
) -> tuple[Tensor, Tensor, int]:
    """Return the potentials f and g of ``OT_eps(a, b)`` and the rounds taken.

    The last update is f's, so ``<a, f> + <b, g>`` is a value of the dual and the error is of 2nd
    order in that of the potentials.
    """
    x, y = kernel.x, kernel.y
    if x.shape[-1] > 1:
        assert not isinstance(kernel, LaplaceLine)
        if isinstance(kernel, DenseKernel) and fits_newton(kernel):
            return newton_pair_annealed(kernel, log_a, log_b, options)
        return alternate(kernel, log_a, log_b, options)
    g = _exact_potential(x, y, log_a.exp(), log_b.exp(), options.p).to(x.dtype)
    if not (isinstance(kernel, DenseKernel) and fits_newton(kernel)):
        return diffusion_rounds(kernel, g, log_a, log_b, options)
    back = kernel.transposed
    f = kernel.softmin(options.epsilon, log_b, g)
    f, taken = newton_pair(kernel, f, log_a, log_b, options)
    g = back.softmin(options.epsilon, log_a, f)
    return kernel.softmin(options.epsilon, log_b, g), g, taken


def solve_self(kernel: Kernel, log_a: Tensor, options: SinkhornOptions) -> tuple[Tensor, Tensor]:
    """Return two neighbouring iterates of the potential of ``OT_eps(a, a)``.

    ``<a, f + f'>`` is a value of the dual. The symmetric update has derivative -Q, with
    eigenvalues in [-1, 0]: the heavy ball below is the best for that range and contracts by 0.17
    a round at any epsilon, from near zero, so no annealing is needed.
    """
    epsilon = options.epsilon
    if isinstance(kernel, DenseKernel) and fits_newton(kernel):
        f = 0.5 * kernel.softmin(epsilon, log_a, torch.zeros_like(log_a))
        f, _ = newton_self(kernel, f, log_a, options)
        return f, kernel.softmin(epsilon, log_a, f)

    watched = options.is_watched(kernel.x)
    rounds = options.iterations or (options.max_iterations if watched else _UNWATCHED_ROUNDS)
    exact = quick = _self_update(kernel)
    if isinstance(kernel, StreamedKernel):
        quick = kernel.rough(epsilon).softmin_self
    f = 0.5 * quick(epsilon, log_a, torch.zeros_like(log_a))
    following, before = quick(epsilon, log_a, f), f
    for k in range(rounds):
        # two rounds of plain averaging first: the range of eigenvalues is that of the optimum
        step, memory = (_BALL_STEP, _BALL_MEMORY) if k > 1 else (0.5, 0.0)
        f, before = f + step * (following - f) + memory * (f - before), f
        update = exact if k >= min(_QUICK_ROUNDS, rounds - 1) else quick
        following = update(epsilon, log_a, f)
        if watched:
            miss = (log_a.exp() * torch.expm1((f - following) / epsilon).abs()).sum(-1)
            if update == exact and not bool((miss > options.tol).any()):
                break
            if not bool((miss > _QUICK_TOL).any()):
                quick = exact
    return f, following


def _self_update(kernel: Kernel) -> Callable[[float, Tensor, Tensor], Tensor]:
    """Return the operator of a self-term, softmin(epsilon, log_a, f), at its fastest."""
    return kernel.softmin_self if isinstance(kernel, StreamedKernel) else kernel.softmin
