"""The general entropic kernel: batched log-domain Sinkhorn for points in any dimension.

The solver speaks to the geometry through two operators, the soft minimum and the pull, so a faster
geometry (sorted, banded, on a grid, streamed) takes the place of `DenseKernel` and nothing else
changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .dense import DenseKernel
from .diffusion import diffusion_rounds
from .exact import solve_exact
from .line import LaplaceLine
from .newton import fits_newton, newton_pair, newton_self
from .options import Potentials, SinkhornOptions

# Rounds between two looks at the marginals: a look costs less than a round, yet it is not free.
_ROUNDS_PER_CHECK = 5
# Rounds where nothing may be read back from the device, so that no test can end them.
_UNWATCHED_ROUNDS = 100
# Diameters over blurs that annealing then goes through; surplus rounds run at the target.
_UNWATCHED_RANGE = 1e4
# Step and memory of the heavy ball for a linear map with eigenvalues in [1, 2].
_BALL_STEP, _BALL_MEMORY = 0.686, 0.0294
# Points a side up to which costs in memory and Newton beat prefix sums.
_SMALL_LINE = 256

Kernel = DenseKernel | LaplaceLine


def _diameter(x: Tensor, y: Tensor) -> Tensor:
    """Return the diagonal of the box around x and y, shape (*)."""
    low = torch.minimum(x.amin(-2), y.amin(-2))
    high = torch.maximum(x.amax(-2), y.amax(-2))
    diameter: Tensor = torch.linalg.vector_norm(high - low, dim=-1)
    return diameter


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
            self.rounds_down = math.ceil(math.log(_UNWATCHED_RANGE) / -math.log(options.scaling))

    def __call__(self, k: int) -> Tensor | float:
        if self.diameter is None or k >= self.rounds_down:
            return self.options.epsilon
        reach = (self.diameter * self.options.scaling**k).clamp(min=self.options.blur)
        return (reach**self.options.p)[..., None]


def _rounds(watched: bool, options: SinkhornOptions, schedule: _Schedule) -> int:
    if options.iterations is not None:
        return options.iterations
    return schedule.rounds_down + options.max_iterations if watched else _UNWATCHED_ROUNDS


def _start(
    kernel: Kernel, log_a: Tensor, log_b: Tensor, options: SinkhornOptions
) -> tuple[Tensor, _Schedule]:
    """Return a first g: exact Kantorovich potentials on a line, elsewhere 0 and a way down."""
    x, y = kernel.x, kernel.y
    watched = options.is_watched(x)
    if x.shape[-1] > 1:
        return torch.zeros_like(log_b), _Schedule(options, _diameter(x, y), watched)
    return _exact_potential(x, y, log_a.exp(), log_b.exp(), options.p).to(x.dtype), _Schedule(
        options, None, watched
    )


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
) -> tuple[Tensor, Tensor]:
    """Return the potentials (f, g) of ``OT_eps(a, b)``.

    The last update is f's, so ``<a, f> + <b, g>`` is a value of the dual and the error is of 2nd
    order in that of the potentials.
    """
    g, schedule = _start(kernel, log_a, log_b, options)
    if isinstance(kernel, LaplaceLine):
        return diffusion_rounds(kernel, g, log_a, log_b, options)
    back = kernel.transposed
    if not fits_newton(kernel):
        return _alternate(kernel, g, log_a, log_b, options, schedule)
    f = kernel.softmin(schedule(0), log_b, g)
    for k in range(schedule.rounds_down):
        epsilon = schedule(k)
        g = back.softmin(epsilon, log_a, f)
        f = newton_pair(kernel, kernel.softmin(epsilon, log_b, g), log_a, log_b, options, epsilon)
    f = newton_pair(kernel, f, log_a, log_b, options)
    g = back.softmin(options.epsilon, log_a, f)
    return kernel.softmin(options.epsilon, log_b, g), g


def _alternate(
    kernel: DenseKernel, g: Tensor, log_a: Tensor, log_b: Tensor,
    options: SinkhornOptions, schedule: _Schedule,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    watched = options.is_watched(kernel.x)
    back = kernel.transposed
    f = kernel.softmin(schedule(0), log_b, g)
    for k in range(_rounds(watched, options, schedule)):
        epsilon = schedule(k)
        previous = g
        g = back.softmin(epsilon, log_a, f)
        f = kernel.softmin(epsilon, log_b, g)
        # (f, previous) misses b's marginal by b_j |exp((previous_j - g_j) / eps) - 1|
        if watched and k >= schedule.rounds_down and k % _ROUNDS_PER_CHECK == 0:
            miss = (log_b.exp() * torch.expm1((previous - g) / options.epsilon).abs()).sum(-1)
            if not bool((miss > options.tol).any()):
                break
    return f, g


def solve_self(kernel: Kernel, log_a: Tensor, options: SinkhornOptions) -> tuple[Tensor, Tensor]:
    """Return two neighbouring iterates of the potential of ``OT_eps(a, a)``.

    ``<a, f + f'>`` is a value of the dual. The symmetric update has derivative -Q, with
    eigenvalues in [-1, 0]: the heavy ball below is the best for that range and contracts by 0.17
    a round at any epsilon, from near zero, so no annealing is needed.
    """
    epsilon = options.epsilon
    f = 0.5 * kernel.softmin(epsilon, log_a, torch.zeros_like(log_a))
    if isinstance(kernel, DenseKernel) and fits_newton(kernel):
        f = newton_self(kernel, f, log_a, options)
        return f, kernel.softmin(epsilon, log_a, f)
    watched = options.is_watched(kernel.x)
    following = kernel.softmin(epsilon, log_a, f)
    before = f
    for k in range(_rounds(watched, options, _Schedule(options, None, watched))):
        # two rounds of plain averaging first: the range of eigenvalues is that of the optimum
        step, memory = (_BALL_STEP, _BALL_MEMORY) if k > 1 else (0.5, 0.0)
        f, before = f + step * (following - f) + memory * (f - before), f
        following = kernel.softmin(epsilon, log_a, f)
        if watched:
            miss = (log_a.exp() * torch.expm1((f - following) / epsilon).abs()).sum(-1)
            if not bool((miss > options.tol).any()):
                break
    return f, following


def choose_kernel(x: Tensor, y: Tensor, p: int) -> Kernel:
    """Return the fastest geometry: prefix sums for p = 1 on a line, unless the problem is small."""
    small = x.shape[-2] * y.shape[-2] <= _SMALL_LINE**2
    if p == 1 and x.shape[-1] == 1 and not small:
        return LaplaceLine(x, y)
    return DenseKernel(x, y, p)


def solve_entropic(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions
) -> tuple[Tensor, Potentials]:
    """Return the divergences (*,) and the potentials; weights (*, N), (*, M) with rows of sum 1."""
    log_a, log_b = a.log(), b.log()
    kernel = choose_kernel(x, y, options.p)
    f, g = solve_pair(kernel, log_a, log_b, options)
    cost = (a * f).sum(-1) + (b * g).sum(-1)
    if not options.debias:
        return cost, Potentials(f, g, None, None)
    f_self, f_next = solve_self(choose_kernel(x, x, options.p), log_a, options)
    g_self, g_next = solve_self(choose_kernel(y, y, options.p), log_b, options)
    cost = cost - 0.5 * (a * (f_self + f_next)).sum(-1) - 0.5 * (b * (g_self + g_next)).sum(-1)
    return cost, Potentials(f, g, f_self, g_self)


def entropic_gradients(
    grad: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor, potentials: Potentials,
    options: SinkhornOptions, wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Return ``grad`` times the derivatives in x, y, a and b, None where not ``wanted``.

    Envelope theorem: x_i moves by ``a_i (pull towards b - pull towards a itself)``, and the
    derivative in a is f, up to a constant that normalising the weights removes.
    """
    f, g, f_self, g_self = potentials
    grads: list[Tensor | None] = [None, None, None, None]
    if wanted[0] or wanted[1]:
        kernel = choose_kernel(x, y, options.p)
        if wanted[0]:
            pull = _debiased_pull(kernel, a, b, g, f_self, options)
            grads[0] = (grad[..., None, None] * a[..., None] * pull).sum_to_size(x.shape)
        if wanted[1]:
            pull = _debiased_pull(kernel.transposed, b, a, f, g_self, options)
            grads[1] = (grad[..., None, None] * b[..., None] * pull).sum_to_size(y.shape)
    if wanted[2]:
        slope = f if f_self is None else f - f_self
        grads[2] = (grad[..., None] * slope).sum_to_size(a.shape)
    if wanted[3]:
        slope = g if g_self is None else g - g_self
        grads[3] = (grad[..., None] * slope).sum_to_size(b.shape)
    return grads


def _debiased_pull(
    kernel: Kernel, a: Tensor, b: Tensor, g: Tensor, f_self: Tensor | None,
    options: SinkhornOptions,
) -> Tensor:  # fmt: skip
    pull = kernel.pull(options.epsilon, b.log(), g)
    if f_self is None:
        return pull
    own = choose_kernel(kernel.x, kernel.x, options.p)
    return pull - own.pull(options.epsilon, a.log(), f_self)
