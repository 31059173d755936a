"""The general entropic kernel: batched log-domain Sinkhorn for points in any dimension.

The solver speaks to the geometry through two operators, the soft minimum and the pull, so a faster
geometry (sorted, banded, on a grid, streamed) takes the place of `DenseKernel` and nothing else
changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .exact import solve_exact

# Rounds between two looks at the marginals: a look costs less than a round, yet it is not free.
_ROUNDS_PER_CHECK = 5
# Rounds where nothing may be read back from the device, so that no test can end them.
_UNWATCHED_ROUNDS = 100


@dataclass(frozen=True)
class SinkhornOptions:
    """What `sinkhorn_divergence` was asked for; see its docstring."""

    p: int
    blur: float
    debias: bool
    scaling: float
    iterations: int | None
    tol: float
    max_iterations: int

    @property
    def epsilon(self) -> float:
        return self.blur**self.p


class Potentials(NamedTuple):
    """Dual potentials of the three transport problems of one divergence."""

    f: Tensor  # (*, N): a -> b
    g: Tensor  # (*, M): b -> a
    f_self: Tensor | None  # (*, N): a -> a, None without debiasing
    g_self: Tensor | None  # (*, M): b -> b


class DenseKernel:
    """The Gibbs kernel between x (*, N, D) and y (*, M, D), all N x M costs in memory."""

    def __init__(self, x: Tensor, y: Tensor, p: int) -> None:
        self.x, self.y, self.p = x, y, p
        if x.shape[-1] == 1:
            distance = (x - y.transpose(-1, -2)).abs()
        else:
            distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        self.distance = distance
        self.cost = distance if p == 1 else 0.5 * distance.square()

    @property
    def transposed(self) -> DenseKernel:
        other = object.__new__(DenseKernel)
        other.x, other.y, other.p = self.y, self.x, self.p
        other.distance = self.distance.transpose(-1, -2)
        other.cost = self.cost.transpose(-1, -2)
        return other

    def _exponent(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        scale = epsilon[..., None] if isinstance(epsilon, Tensor) else epsilon
        return (log_b + g / epsilon)[..., None, :] - self.cost / scale

    def softmin(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """``-eps log sum_j b_j exp((g_j - C_ij) / eps)``, shape (*, N); eps a number or (*, 1)."""
        return torch.logsumexp(self._exponent(epsilon, log_b, g), -1).mul(-epsilon)

    def pull(self, epsilon: float, log_b: Tensor, g: Tensor) -> Tensor:
        """``sum_j P(j | i) grad_x c(x_i, y_j)``, shape (*, N, D): the gradient per unit of mass."""
        plan = self._exponent(epsilon, log_b, g).softmax(-1)
        if self.p == 1:  # unit vectors, and 0 where the points meet
            inverse = torch.where(self.distance > 0, self.distance, 1.0).reciprocal()
            plan = torch.where(self.distance > 0, plan * inverse, 0.0)
        return plan.sum(-1, keepdim=True) * self.x - plan @ self.y


def _diameter(x: Tensor, y: Tensor) -> Tensor:
    """Return the diagonal of the box around x and y, shape (*)."""
    low = torch.minimum(x.amin(-2), y.amin(-2))
    high = torch.maximum(x.amax(-2), y.amax(-2))
    return (high - low).norm(dim=-1)


class _Schedule:
    """Epsilon round by round: from the diameter down to the target, then the target."""

    def __init__(self, options: SinkhornOptions, diameter: Tensor | None, watched: bool) -> None:
        self.options = options
        self.diameter = diameter
        self.rounds_down = 0
        if diameter is not None and watched:
            ratio = float(diameter.max()) / options.blur if diameter.numel() else 1.0
            self.rounds_down = math.ceil(math.log(max(ratio, 1.0)) / -math.log(options.scaling))
        elif diameter is not None:
            self.rounds_down = _UNWATCHED_ROUNDS  # the clamp below makes surplus rounds harmless

    def __call__(self, k: int) -> Tensor | float:
        if self.diameter is None or k >= self.rounds_down:
            return self.options.epsilon
        reach = (self.diameter * self.options.scaling**k).clamp(min=self.options.blur)
        return (reach**self.options.p)[..., None]


def _is_watched(x: Tensor, options: SinkhornOptions) -> bool:
    """Whether reading a number back is free, so that convergence can be tested."""
    on_host = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_host and options.iterations is None


def _rounds(watched: bool, options: SinkhornOptions, schedule: _Schedule) -> int:
    if options.iterations is not None:
        return options.iterations
    return schedule.rounds_down + options.max_iterations if watched else _UNWATCHED_ROUNDS


def solve_pair(
    kernel: DenseKernel, log_a: Tensor, log_b: Tensor, options: SinkhornOptions
) -> tuple[Tensor, Tensor]:
    """Return the potentials (f, g) of ``OT_eps(a, b)`` by alternate updates.

    On a line they start at the exact Kantorovich potentials, elsewhere epsilon is annealed. The
    last update is f's, so ``<a, f> + <b, g>`` is a value of the dual and the error is of 2nd order.
    """
    x, y = kernel.x, kernel.y
    watched = _is_watched(x, options)
    if x.shape[-1] == 1:
        schedule = _Schedule(options, None, watched)
        start = solve_exact(
            x[..., 0], y[..., 0], log_a.exp(), log_b.exp(),
            p=options.p, same_points=False, potentials=True,
        )  # fmt: skip
        assert start.g is not None  # asked for
        g = start.g.to(x.dtype)
    else:
        schedule = _Schedule(options, _diameter(x, y), watched)
        g = torch.zeros_like(log_b)
    back = kernel.transposed
    f = kernel.softmin(schedule(0), log_b, g)
    for k in range(_rounds(watched, options, schedule)):
        epsilon = schedule(k)
        previous = g
        g = back.softmin(epsilon, log_a, f)
        f = kernel.softmin(epsilon, log_b, g)
        due = watched and k >= schedule.rounds_down and k % _ROUNDS_PER_CHECK == 0
        # (f, previous) misses b's marginal by b_j |exp((previous_j - g_j) / eps) - 1|
        if due:
            miss = (log_b.exp() * torch.expm1((previous - g) / options.epsilon).abs()).sum(-1)
            if not bool((miss > options.tol).any()):
                break
    return f, g


def solve_self(
    kernel: DenseKernel, log_a: Tensor, options: SinkhornOptions
) -> tuple[Tensor, Tensor]:
    """Return two neighbouring iterates of the potential of ``OT_eps(a, a)``.

    The averaged symmetric update contracts by at least 1/2 at any epsilon, from zero, so no
    annealing is needed. ``<a, f + f'>`` is a value of the dual.
    """
    watched = _is_watched(kernel.x, options)
    schedule = _Schedule(options, None, watched)
    epsilon = options.epsilon
    f = torch.zeros_like(log_a)
    following = kernel.softmin(epsilon, log_a, f)
    for k in range(_rounds(watched, options, schedule)):
        f = 0.5 * (f + following)
        following = kernel.softmin(epsilon, log_a, f)
        if watched and k % _ROUNDS_PER_CHECK == 0:
            miss = (log_a.exp() * torch.expm1((f - following) / epsilon).abs()).sum(-1)
            if not bool((miss > options.tol).any()):
                break
    return f, following


def solve_entropic(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions
) -> tuple[Tensor, Potentials]:
    """Return the divergences (*,) and the potentials; weights (*, N), (*, M) with rows of sum 1."""
    log_a, log_b = a.log(), b.log()
    kernel = DenseKernel(x, y, options.p)
    f, g = solve_pair(kernel, log_a, log_b, options)
    cost = (a * f).sum(-1) + (b * g).sum(-1)
    if not options.debias:
        return cost, Potentials(f, g, None, None)
    f_self, f_next = solve_self(DenseKernel(x, x, options.p), log_a, options)
    g_self, g_next = solve_self(DenseKernel(y, y, options.p), log_b, options)
    cost = cost - 0.5 * (a * (f_self + f_next)).sum(-1) - 0.5 * (b * (g_self + g_next)).sum(-1)
    return cost, Potentials(f, g, f_self, g_self)
