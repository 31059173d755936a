"""The entropic divergence on a line whose tensors lie on the CPU."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import broadcast_shapes
from ..options import SinkhornOptions
from ..solution import EntropicSolution, Slopes
from .arrays import Array, Shape, stretch
from .gauss import MOST_POINTS, GaussKernel, quadratic_start
from .laplace import LaplaceKernel, linear_start
from .newton import HostKernel, log_weights, solve_pair, solve_self

# Most rounds of Newton's, and of the heavy ball of the self-terms, where no number is asked for.
_ROUNDS, _SELF_ROUNDS = 40, 100


def suits_host_solver(x: Tensor, y: Tensor, options: SinkhornOptions) -> bool:
    """Whether `solve_on_host` takes the problem: a line, all rows on the same points.

    Any number of them for p = 1, few for p = 2.
    """
    points = x.shape[-2] + (0 if y is x else y.shape[-2])
    return (
        x.shape[-1] == 1
        and options.backend in ("auto", "prefix")
        and (options.p == 1 or points <= MOST_POINTS)
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and x.shape[:-2].numel() == 1
        and y.shape[:-2].numel() == 1
    )


def solve_on_host(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions
) -> EntropicSolution:
    """Solve for points x (*, N, 1), y (*, M, 1) and weights a (*, N), b (*, M) of sum one.

    Both measures are put on the sorted points of either. Gradients are as in `solve_entropic`, and
    all of them are found: they take no time beside the potentials.
    """
    line = _Line.of(x, y)
    lead = broadcast_shapes(x.shape[:-2], y.shape[:-2], a.shape[:-1], b.shape[:-1])
    one, other = line.spread(a, line.x), line.spread(b, line.y)
    of_power = LaplaceKernel if options.p == 1 else GaussKernel
    kernel: HostKernel = of_power(line.z, options.epsilon)
    fixed = options.iterations is not None
    rounds = options.iterations or min(_ROUNDS, options.max_iterations)
    every_b = stretch(other, lead).reshape(-1, line.z.size)
    every_a = one.reshape(1, -1) if one.size == line.z.size else stretch(one, lead)
    every_a = every_a.reshape(-1, line.z.size)
    start = (linear_start if options.p == 1 else quadratic_start)(line.z, every_a, every_b)
    best, taken = solve_pair(kernel, every_a, every_b, start, options.tol, rounds, fixed)
    f, g = best.due, best.g
    transport = line.rows((every_a * f).sum(-1) + (every_b * g).sum(-1), lead)
    pulls = kernel.pull(
        np.concatenate(
            [log_weights(every_b) + g / options.epsilon, log_weights(every_a) + f / options.epsilon]
        )
    )
    pull_x = line.at(pulls[: len(f)], line.x, lead)
    pull_y = line.at(pulls[len(f) :], line.y, lead)
    potential_x, potential_y = line.at(f, line.x, lead), line.at(g, line.y, lead)
    if not options.debias:
        slopes = (a * pull_x, b * pull_y, potential_x, potential_y)
        return EntropicSolution(transport, _points(slopes), transport, potential_x, potential_y,
                                None, None, taken)  # fmt: skip

    own = np.concatenate([w.reshape(-1, line.z.size) for w in (one, other)])
    rounds = options.iterations or min(_SELF_ROUNDS, options.max_iterations)
    before, after = solve_self(kernel, own, options.tol, rounds, fixed)
    costs = (own * (before + after)).sum(-1)
    pulls = kernel.pull(log_weights(own) + before / options.epsilon)
    split = one.size // line.z.size
    lead_a, lead_b = one.shape[:-1], other.shape[:-1]
    cost = (
        transport - 0.5 * line.rows(costs[:split], lead_a) - 0.5 * line.rows(costs[split:], lead_b)
    )
    self_x, self_y = line.at(after[:split], line.x, lead_a), line.at(after[split:], line.y, lead_b)
    slopes = (
        a * (pull_x - line.at(pulls[:split], line.x, lead_a)),
        b * (pull_y - line.at(pulls[split:], line.y, lead_b)),
        potential_x - self_x,
        potential_y - self_y,
    )
    return EntropicSolution(
        cost, _points(slopes), transport, potential_x, potential_y, self_x, self_y, taken
    )


class _Line(NamedTuple):
    """The sorted distinct points of both sides, and which of them each point is."""

    z: Array  # (K,)
    x: Array  # (N,) place of each point of x
    y: Array  # (M,)
    order: Array | None  # (K,) the points of x in order, where they are all there are

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> _Line:
        """Sort the points of both together."""
        own = x.detach().reshape(-1).numpy()
        points = own if y is x else np.concatenate([own, y.detach().reshape(-1).numpy()])
        order = points.argsort()
        z = points[order]
        new = z[1:] > z[:-1]
        place = np.empty_like(order)
        distinct = bool(new.all())
        if distinct:
            place[order] = np.arange(order.size)
        else:
            place[order] = np.concatenate([[0], np.add.accumulate(new)])
            z = z[np.concatenate([[True], new])]
        shared = y is x
        return cls(
            z, place if shared else place[: own.size], place if shared else place[own.size :],
            order if shared and distinct else None,
        )  # fmt: skip

    def spread(self, weights: Tensor, places: Array) -> Array:
        """Put weights (*, N) of points at these places on all of the line's, (*, K)."""
        values = weights.detach().numpy()
        if self.order is not None:
            return values.take(self.order, -1)
        spread = np.zeros((self.z.size, *values.shape[:-1]))
        np.add.at(spread, places, np.moveaxis(values, -1, 0))
        return np.moveaxis(spread, 0, -1)

    def at(self, values: Array, places: Array, lead: Shape) -> Tensor:
        """Read (R, K) at places (N,): (*lead, N)."""
        return torch.from_numpy(values.take(places, -1)).view(*lead, places.size)

    def rows(self, values: Array, lead: Shape) -> Tensor:
        """Return a number a row as (*lead)."""
        return torch.from_numpy(values).view(lead)


def _points(slopes: tuple[Tensor, Tensor, Tensor, Tensor]) -> Slopes:
    return slopes[0][..., None], slopes[1][..., None], slopes[2], slopes[3]
