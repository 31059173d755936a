"""One entropic transport problem, from its measures to the potentials and what they pull at.

The geometry is chosen here. Two operators of it are enough, the soft minimum and the pull, so a
faster geometry takes the place of a slower one and nothing else changes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .checks import runs_triton
from .dense import DenseKernel
from .line import LaplaceLine
from .options import SinkhornOptions
from .quadrature import Measure, compress, refine
from .solve import Kernel, solve_pair, solve_self
from .streamed import StreamedKernel

# Points a side up to which costs in memory and Newton are the fastest and the surest.
_SMALL = 96
# Times that a compressed measure may be made finer.
_REFINEMENTS = 2


class Side(NamedTuple):
    """One side of a solved problem: its potential, and the other side as a kernel sees it."""

    potential: Tensor  # (*, N)
    kernel: Kernel  # from these points to the other side's
    log_weights: Tensor  # (*, M) of the other side
    other: Tensor  # (*, M) potential of the other side

    def pull(self, epsilon: float) -> Tensor:
        """Gradient of the cost in each point, per unit of its mass, (*, N, D)."""
        return self.kernel.pull(epsilon, self.log_weights, self.other)


class Between(NamedTuple):
    """A solved problem between two measures."""

    side_a: Side
    side_b: Side
    cost: Tensor  # (*,)
    light_a: Measure  # what stood for the measures
    light_b: Measure
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
        from .triton_kernel import TritonKernel  # here, since Triton is not everywhere

        return TritonKernel(x, y, p)
    return DenseKernel(x, y, p) if backend == "dense" else StreamedKernel(x, y, p)


def lighten(measure: Measure, options: SinkhornOptions) -> Measure:
    """Return what stands for the measure while potentials are sought."""
    points = measure.points
    on_line = options.p == 2 and points.shape[-1] == 1 and points.shape[-2] > _SMALL
    if on_line and options.backend == "auto" and options.is_watched(points):
        return compress(measure, options.blur)
    return measure


def solve_between(a: Measure, b: Measure, options: SinkhornOptions) -> Between:
    """Solve ``OT_eps(a, b)`` by way of measures of fewer points where they do.

    Those are made finer until they suit the plan between them.
    """
    light_a, light_b = lighten(a, options), lighten(b, options)
    for last in (*[False] * _REFINEMENTS, True):
        kernel = choose_kernel(light_a.points, light_b.points, options)
        f, g, taken = solve_pair(kernel, light_a.log_weights, light_b.log_weights, options)
        if last or (light_a is a and light_b is b):
            break
        reach_a = _reach(kernel, light_a.log_weights, light_b.log_weights, f, g, options)
        reach_b = _reach(kernel.transposed, light_b.log_weights, light_a.log_weights, g, f, options)
        finer_a, finer_b = (
            refine(a, light_a, reach_a, options),
            refine(b, light_b, reach_b, options),
        )
        if finer_a is light_a and finer_b is light_b:
            break
        light_a, light_b = finer_a, finer_b
    side_a = _side(a, light_a, light_b, kernel, f, g, options)
    side_b = _side(b, light_b, light_a, kernel.transposed, g, f, options)
    cost = (a.weights * side_a.potential).sum(-1) + (b.weights * side_b.potential).sum(-1)
    return Between(side_a, side_b, cost, light_a, light_b, taken)


def _reach(
    kernel: Kernel, log_a: Tensor, log_b: Tensor, f: Tensor, g: Tensor, options: SinkhornOptions
) -> Tensor:
    """Return how far from its mean place each point's mass matters, (*, N).

    Towards y_j the plan out of x varies as ``exp(x (y_j - mean) / eps)``; the fourth power of that
    distance, times the part of y_j's mass that comes from x, makes the error of a cell at x.
    """
    epsilon, places = options.epsilon, kernel.y[..., 0]
    if not isinstance(kernel, DenseKernel):
        mean = kernel.average(epsilon, log_b, g, places)
        square = kernel.average(epsilon, log_b, g, places**2)
        return (square - mean**2).clamp(min=0.0).sqrt()
    mean = kernel.average(epsilon, log_b, g, places)
    origin = kernel.transposed.conditional(epsilon, log_a, f).transpose(-1, -2)
    distance = (places[..., None, :] - mean[..., :, None]).abs()
    return (distance * origin**0.25).amax(-1)


def solve_within(a: Measure, light: Measure, options: SinkhornOptions) -> tuple[Side, Tensor]:
    """Solve ``OT_eps(a, a)``; return the one side that there is and the cost."""
    kernel = choose_kernel(light.points, light.points, options)
    f, following = solve_self(kernel, light.log_weights, options)
    side = _side(a, light, light, kernel, following, f, options)
    if light is a:
        return side, (a.weights * (f + following)).sum(-1)
    return side, 2.0 * (a.weights * side.potential).sum(-1)


def _side(
    own: Measure, light: Measure, other: Measure, kernel: Kernel, potential: Tensor,
    other_potential: Tensor, options: SinkhornOptions,
) -> Side:  # fmt: skip
    """Return the side of all points of ``own``, though ``light`` stood for it."""
    if light is not own:
        kernel = choose_kernel(own.points, other.points, options)
        potential = kernel.softmin(options.epsilon, other.log_weights, other_potential)
    return Side(potential, kernel, other.log_weights, other_potential)
