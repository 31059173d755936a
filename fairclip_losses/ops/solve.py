"""The potentials of one entropic problem: where to start and which method to go on with."""

from __future__ import annotations

from torch import Tensor

from .exact import exact_potentials
from .kernels.dense import DenseKernel
from .kernels.kinds import Kernel
from .kernels.line import LaplaceLine
from .methods.diffusion import diffusion_rounds
from .methods.newton import answer, fits_newton, newton_pair
from .methods.space import solve_in_space
from .options import SinkhornOptions


def solve_pair(
    kernel: Kernel, log_a: Tensor, log_b: Tensor, options: SinkhornOptions
) -> tuple[Tensor, Tensor, int]:
    """Return the potentials f and g of ``OT_eps(a, b)`` and the rounds taken.

    The last update of one of them is a plain one, so ``<a, f> + <b, g>`` is a value of the dual and
    the error is of 2nd order in that of the potentials.
    """
    x, y = kernel.x, kernel.y
    if x.shape[-1] > 1:
        assert not isinstance(kernel, LaplaceLine)
        return solve_in_space(kernel, log_a, log_b, options)
    _, g = exact_potentials(x[..., 0], y[..., 0], log_a.exp(), log_b.exp(), options.p)
    g = g.to(x.dtype)
    if not (isinstance(kernel, DenseKernel) and fits_newton(kernel.x, kernel.y)):
        return diffusion_rounds(kernel, g, log_a, log_b, options)
    f = kernel.softmin(options.epsilon, log_b, g)
    f, taken = newton_pair(kernel, f, log_a, log_b, options)
    return *answer(kernel, f, log_a, log_b, options, taken), taken
