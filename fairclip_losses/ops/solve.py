"""The potentials of one entropic problem: where to start and which method to go on with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .band import BandKernel
from .dense import DenseKernel
from .diffusion import diffusion_rounds
from .exact import solve_exact
from .line import LaplaceLine
from .newton import fits_newton, newton_pair, newton_self
from .options import SinkhornOptions
from .streamed import StreamedKernel

# Rounds between two looks at the marginals: a look costs less than a round, yet it is not free.
_ROUNDS_PER_CHECK = 5
# Rounds where nothing may be read back from the device, so that no test can end them.
_UNWATCHED_ROUNDS = 100
# Diameters over blurs that annealing then goes through; surplus rounds run at the target.
_UNWATCHED_RANGE = 1e4
# Step and memory of the heavy ball for a linear map with eigenvalues in [1, 2].
_BALL_STEP, _BALL_MEMORY = 0.686, 0.0294
# First width of a band, in points, and the marginal error, in units of ``tol``, above which it is
# widened.
_BAND, _BAND_ERROR = 48, 1.0

Kernel = DenseKernel | LaplaceLine | StreamedKernel


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
) -> tuple[Tensor, Tensor, int]:
    """Return the potentials f and g of ``OT_eps(a, b)`` and the rounds taken.

    The last update is f's, so ``<a, f> + <b, g>`` is a value of the dual and the error is of 2nd
    order in that of the potentials.
    """
    g, schedule = _start(kernel, log_a, log_b, options)
    if not (isinstance(kernel, DenseKernel) and fits_newton(kernel)):
        if kernel.x.shape[-1] == 1:
            if isinstance(kernel, StreamedKernel) and options.is_watched(kernel.x):
                return _in_a_band(kernel, g, log_a, log_b, options)
            return diffusion_rounds(kernel, g, log_a, log_b, options)
        return _alternate(kernel, g, log_a, log_b, options, schedule)
    back = kernel.transposed
    f = kernel.softmin(schedule(0), log_b, g)
    taken = 0
    for k in range(schedule.rounds_down):
        epsilon = schedule(k)
        g = back.softmin(epsilon, log_a, f)
        f = kernel.softmin(epsilon, log_b, g)
        f, rounds = newton_pair(kernel, f, log_a, log_b, options, epsilon)
        taken += rounds
    f, rounds = newton_pair(kernel, f, log_a, log_b, options)
    g = back.softmin(options.epsilon, log_a, f)
    return kernel.softmin(options.epsilon, log_b, g), g, taken + rounds


def _in_a_band(
    kernel: StreamedKernel, g: Tensor, log_a: Tensor, log_b: Tensor, options: SinkhornOptions
) -> tuple[Tensor, Tensor, int]:
    """Solve near the monotone coupling, in bands that widen until the whole kernel agrees."""
    epsilon, back = options.epsilon, kernel.transposed
    a, b = log_a.exp(), log_b.exp()
    points, width = max(a.shape[-1], b.shape[-1]), _BAND
    taken = 0
    while 2 * width < points:
        band = BandKernel(kernel.x, kernel.y, options.p, a, b, width)
        f, g, rounds = diffusion_rounds(band, g, log_a, log_b, options)
        taken += rounds
        whole_f, whole_g = kernel.softmin(epsilon, log_b, g), back.softmin(epsilon, log_a, f)
        narrow_f = band.softmin(epsilon, log_b, g)
        narrow_g = band.transposed.softmin(epsilon, log_a, f)
        missed = torch.maximum(
            (a * torch.expm1((narrow_f - whole_f) / epsilon).abs()).sum(-1),
            (b * torch.expm1((narrow_g - whole_g) / epsilon).abs()).sum(-1),
        )
        if not bool((missed > _BAND_ERROR * options.tol).any()):
            return f, whole_g, taken
        width *= 4
    f, g, rounds = diffusion_rounds(kernel, g, log_a, log_b, options)
    return f, g, taken + rounds


def _alternate(
    kernel: Kernel, g: Tensor, log_a: Tensor, log_b: Tensor,
    options: SinkhornOptions, schedule: _Schedule,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    watched = options.is_watched(kernel.x)
    back = kernel.transposed
    f = kernel.softmin(schedule(0), log_b, g)
    taken = _rounds(watched, options, schedule)
    for k in range(taken):
        epsilon = schedule(k)
        previous = g
        g = back.softmin(epsilon, log_a, f)
        f = kernel.softmin(epsilon, log_b, g)
        # (f, previous) misses b's marginal by b_j |exp((previous_j - g_j) / eps) - 1|
        if watched and k >= schedule.rounds_down and k % _ROUNDS_PER_CHECK == 0:
            miss = (log_b.exp() * torch.expm1((previous - g) / options.epsilon).abs()).sum(-1)
            if not bool((miss > options.tol).any()):
                taken = k + 1
                break
    return f, g, taken


def solve_self(kernel: Kernel, log_a: Tensor, options: SinkhornOptions) -> tuple[Tensor, Tensor]:
    """Return two neighbouring iterates of the potential of ``OT_eps(a, a)``.

    ``<a, f + f'>`` is a value of the dual. The symmetric update has derivative -Q, with
    eigenvalues in [-1, 0]: the heavy ball below is the best for that range and contracts by 0.17
    a round at any epsilon, from near zero, so no annealing is needed.
    """
    epsilon = options.epsilon
    f = 0.5 * kernel.softmin(epsilon, log_a, torch.zeros_like(log_a))
    if isinstance(kernel, DenseKernel) and fits_newton(kernel):
        f, _ = newton_self(kernel, f, log_a, options)
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
