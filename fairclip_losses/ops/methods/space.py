"""One problem between clouds in space (D > 1): which method goes first, and which one after it."""

from __future__ import annotations

from torch import Tensor

from ..checks import warn_unconverged
from ..kernels.dense import DenseKernel
from ..kernels.kinds import SpaceKernel
from ..options import SinkhornOptions
from .alternate import alternate
from .newton import fits_newton, newton_pair_annealed

# Most alternate updates, at all epsilons, before Newton's method where it may be used.
_PATIENCE = 100


def solve_in_space(
    kernel: SpaceKernel, log_a: Tensor, log_b: Tensor, options: SinkhornOptions
) -> tuple[Tensor, Tensor, int]:
    """Return the potentials f and g of ``OT_eps(a, b)`` and the rounds taken.

    Alternate updates are the fastest at most blurs, Newton's method at the smallest ones: on all
    costs where they fit in memory, above on the entries that the plan has left. On all costs it
    also is the surer where nobody may look at the convergence.
    """
    if not (
        isinstance(kernel, DenseKernel)
        and fits_newton(kernel.x, kernel.y)
        and options.iterations is None
    ):
        f, g, rounds, error = alternate(kernel, log_a, log_b, options)
        if error is not None and not error <= options.tol:
            warn_unconverged(error, options, rounds)
        return f, g, rounds
    rounds = 0
    if options.is_watched(kernel.x):
        f, g, rounds, error = alternate(kernel, log_a, log_b, options, _PATIENCE)
        if error is not None and error <= options.tol:
            return f, g, rounds
    return newton_pair_annealed(kernel, log_a, log_b, options, rounds)
