"""One entropic transport problem, from its measures to the potentials and what they pull at.

The geometry is chosen here. Two operators of it are enough, the soft minimum and the pull, so a
faster geometry takes the place of a slower one and nothing else changes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .checks import runs_triton
from .kernels.dense import DenseKernel
from .kernels.kinds import Kernel
from .kernels.line import LaplaceLine
from .kernels.streamed import StreamedKernel
from .methods.symmetric import solve_symmetric
from .options import SinkhornOptions
from .solve import solve_pair

# Points a side up to which costs in memory and Newton are the fastest and the surest.
_SMALL = 96


class Measure:
    """Points (*, N, D) and weights (*, N) of sum one."""

    def __init__(self, points: Tensor, weights: Tensor) -> None:
        self.points, self.weights, self.log_weights = points, weights, weights.log()


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


def choose_kernel(x: Tensor, y: Tensor, options: SinkhornOptions) -> Kernel:
    """Return the geometry of ``options.backend``; the rule of "auto" stands in the public entry."""
    n, m, p, backend = x.shape[-2], y.shape[-2], options.p, options.backend
    if backend == "auto":
        if p == 1 and x.shape[-1] == 1 and n * m > _SMALL**2:
            backend = "prefix"
        elif x.shape[-1] > 1 and x.is_cuda and runs_triton(x):
            backend = "triton"
        else:
            backend = "dense" if DenseKernel.fits(n, m) else "streamed"
    if backend == "prefix":
        return LaplaceLine(x, y)
    if backend == "triton":
        from .kernels.triton_kernel import TritonKernel  # here, since Triton is not everywhere

        return TritonKernel(x, y, p)
    return DenseKernel(x, y, p) if backend == "dense" else StreamedKernel(x, y, p)


def solve_between(a: Measure, b: Measure, options: SinkhornOptions) -> Between:
    """Solve ``OT_eps(a, b)``."""
    kernel = choose_kernel(a.points, b.points, options)
    f, g, taken = solve_pair(kernel, a.log_weights, b.log_weights, options)
    cost = (a.weights * f).sum(-1) + (b.weights * g).sum(-1)
    side_a = Side(f, kernel, b.log_weights, g)
    return Between(side_a, Side(g, kernel.transposed, a.log_weights, f), cost, taken)


def solve_within(a: Measure, options: SinkhornOptions) -> tuple[Side, Tensor]:
    """Solve ``OT_eps(a, a)``; return the one side that there is and the cost."""
    kernel = choose_kernel(a.points, a.points, options)
    f, following = solve_symmetric(kernel, a.log_weights, options)
    cost = (a.weights * (f + following)).sum(-1)
    return Side(following, kernel, a.log_weights, f), cost
