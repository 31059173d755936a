"""One entropic transport problem, from its measures to the potentials and what they pull at.

The geometry is chosen here. Two operators of it are enough, the soft minimum and the pull, so a
faster geometry takes the place of a slower one and nothing else changes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from .checks import broadcast_shapes, runs_triton
from .kernels.dense import DenseKernel
from .kernels.kinds import Kernel
from .kernels.line import LaplaceLine
from .kernels.streamed import StreamedKernel
from .methods.newton import fits_newton
from .methods.symmetric import solve_symmetric
from .options import Backend, SinkhornOptions
from .solve import solve_pair

# On a line, for either p: costs of one row up to which they are kept in memory for Newton's method,
# whatever the rows, and of all rows. For p = 1 prefix sums follow sooner, though not as surely.
_COSTS_OF_A_ROW = {1: 96**2, 2: 512**2}
_COSTS_OF_ALL = {1: 2**21, 2: 2**23}


class Measure:
    """Points (*, N, D) and weights (*, N) of sum one."""

    def __init__(self, points: Tensor, weights: Tensor) -> None:
        self.points, self.weights, self.log_weights = points, weights, weights.log()
        self.lead = broadcast_shapes(points.shape[:-2], weights.shape[:-1])


class Side(NamedTuple):
    """One side of a solved problem: its potential, and the other side as a kernel sees it."""

    potential: Tensor  # (*, N)
    kernel: Kernel  # from these points to the other side's
    log_weights: Tensor  # (*, M) of the other side
    other: Tensor  # (*, M) potential of the other side

    def pull(self, epsilon: float, less: Tensor | None = None) -> Tensor:
        """Gradient of the cost in each point, per unit of its mass, (*, N, D), minus ``less``."""
        if isinstance(self.kernel, StreamedKernel):
            return self.kernel.pull(epsilon, self.log_weights, self.other, less)
        pull = self.kernel.pull(epsilon, self.log_weights, self.other)
        return pull if less is None else pull - less


class Between(NamedTuple):
    """A solved problem between two measures."""

    side_a: Side
    side_b: Side
    cost: Tensor  # (*,)
    rounds: int


def choose_kernel(x: Tensor, y: Tensor, options: SinkhornOptions, rows: int) -> Kernel:
    """Return the geometry of ``options.backend``; the rule of "auto" stands in the public entry."""
    backend = options.backend
    if backend == "auto":
        line = x.shape[-1] == 1
        backend = _on_a_line(x, y, options.p, rows) if line else _in_space(x, y)
    if backend == "prefix":
        return LaplaceLine(x, y)
    if backend == "triton":
        from .kernels.triton_kernel import TritonKernel  # here, since Triton is not everywhere

        return TritonKernel(x, y, options.p)
    return (DenseKernel if backend == "dense" else StreamedKernel)(x, y, options.p)


def _on_a_line(x: Tensor, y: Tensor, p: int, rows: int) -> Backend:
    n, m = x.shape[-2], y.shape[-2]
    few = n * m <= _COSTS_OF_A_ROW[p] or rows * n * m <= _COSTS_OF_ALL[p]
    if few and fits_newton(x, y):
        return "dense"
    if p == 1:
        return "prefix"
    return "triton" if x.is_cuda and runs_triton(x) else "streamed"


def _in_space(x: Tensor, y: Tensor) -> Backend:
    if x.is_cuda and runs_triton(x):
        return "triton"
    return "dense" if DenseKernel.fits(x.shape[-2], y.shape[-2]) else "streamed"


def solve_between(a: Measure, b: Measure, options: SinkhornOptions) -> Between:
    """Solve ``OT_eps(a, b)``."""
    rows = math.prod(broadcast_shapes(a.lead, b.lead))
    kernel = choose_kernel(a.points, b.points, options, rows)
    f, g, taken = solve_pair(kernel, a.log_weights, b.log_weights, options)
    cost = (a.weights * f).sum(-1) + (b.weights * g).sum(-1)
    side_a = Side(f, kernel, b.log_weights, g)
    return Between(side_a, Side(g, kernel.transposed, a.log_weights, f), cost, taken)


def solve_within(a: Measure, options: SinkhornOptions) -> tuple[Side, Tensor]:
    """Solve ``OT_eps(a, a)``; return the one side that there is and the cost."""
    kernel = choose_kernel(a.points, a.points, options, math.prod(a.lead))
    f, following = solve_symmetric(kernel, a.log_weights, options)
    cost = (a.weights * (f + following)).sum(-1)
    return Side(following, kernel, a.log_weights, f), cost
