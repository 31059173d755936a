"""The potential of a measure against itself: averaged updates with momentum."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..checks import is_readable, warn_unconverged
from ..heavy_ball import MEMORY, STEP
from ..kernels.dense import DenseKernel
from ..kernels.kinds import Kernel
from ..kernels.streamed import StreamedKernel
from ..options import SinkhornOptions
from .progress import PATIENCE, Progress, marginal_error

# Rounds where nothing may be read back from the device: they leave 1e-11 of the first's error.
_UNWATCHED_ROUNDS = 16


def solve_symmetric(
    kernel: Kernel, log_a: Tensor, options: SinkhornOptions
) -> tuple[Tensor, Tensor]:
    """Return two neighbouring iterates of the potential of ``OT_eps(a, a)``.

    ``<a, f + f'>`` is a value of the dual. The symmetric update has derivative -Q, with
    eigenvalues in [-1, 0]: the heavy ball below is the best for that range and contracts by 0.17
    a round at any epsilon, from near zero, so no annealing is needed.
    """
    epsilon, watched, a = options.epsilon, options.is_watched(kernel.x), log_a.exp()
    rounds = options.iterations or (options.max_iterations if watched else _UNWATCHED_ROUNDS)
    rounds = max(rounds - 1, 1)  # the start is one
    kernels = [kernel]
    if isinstance(kernel, StreamedKernel):
        quick = kernel.rough(epsilon, log_a.shape[:-1])
        kernels = [kernel] if quick is kernel else [quick, kernel]
    progress, error = Progress(options.tol, kernel.spare * options.tol), 0.0
    updates = [_update(each, epsilon, log_a) for each in kernels]
    f = before = 0.5 * updates[0](torch.zeros_like(log_a))
    for k in range(rounds):
        if k == rounds - 1:
            del kernels[:-1], updates[:-1]
        following = updates[0](f)
        if watched:
            progress.expect_rounding(kernels[0], epsilon)
            progress.patience = PATIENCE if len(kernels) > 1 else math.inf
            error = marginal_error(a, f, following, epsilon)
            if progress.ends(error):
                if len(kernels) == 1:
                    break
                del kernels[0], updates[0]
        if k < rounds - 1:
            f, before = f + STEP * (following - f) + MEMORY * (f - before), f
    if watched and not error <= options.tol:
        warn_unconverged(error, options, k + 2)
    if _leaves_absent_points_out(kernel, log_a):
        following = kernel.softmin(epsilon, log_a, f)
    return f, following


def _update(kernel: Kernel, epsilon: float, log_a: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the kernel's softmin(epsilon, log_a, f) at its fastest, where a has mass."""
    if isinstance(kernel, DenseKernel):
        return kernel.softmin_within(epsilon, log_a)
    softmin = kernel.softmin_again if isinstance(kernel, StreamedKernel) else kernel.softmin
    return partial(softmin, epsilon, log_a)


def _leaves_absent_points_out(kernel: Kernel, log_a: Tensor) -> bool:
    """Whether the updates are wrong at points without mass, as far as looking costs no wait."""
    if isinstance(kernel, StreamedKernel):  # on the host alone
        return is_readable(log_a) and bool((log_a == -torch.inf).any())
    return isinstance(kernel, DenseKernel)
