"""Potentials of clouds in space (D > 1) by alternate updates: annealing, then acceleration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from .anderson import Anderson
from .checks import warn_unconverged
from .dense import DenseKernel
from .options import SinkhornOptions
from .streamed import StreamedKernel

if TYPE_CHECKING:
    from .triton_kernel import TritonKernel

SpaceKernel: TypeAlias = "DenseKernel | StreamedKernel | TritonKernel"

# Rounds where nothing may be read back from the device, so that no test can end them.
_UNWATCHED_ROUNDS = 100
# Diameters over blurs that annealing then goes through; surplus rounds run at the target.
_UNWATCHED_RANGE = 1e4
# Marginal error at which a station on the way down is settled, its most rounds, and the rounds up
# to which the next one is near enough.
_TOL_ON_THE_WAY, _ROUNDS_ON_THE_WAY, _EASY = 0.03, 100, 2


class Annealing:
    """Epsilon round by round: the diameter^p shrinking to the target, then the target.

    The length scale, ``epsilon^(1 / p)``, shrinks by ``scaling`` a round.
    """

    def __init__(self, x: Tensor, y: Tensor, options: SinkhornOptions, scaling: float) -> None:
        self.options, self.scaling = options, scaling
        low = torch.minimum(x.amin(-2), y.amin(-2))
        high = torch.maximum(x.amax(-2), y.amax(-2))
        self.diameter: Tensor = torch.linalg.vector_norm(high - low, dim=-1)
        ratio = _UNWATCHED_RANGE
        if options.is_watched(x):
            ratio = float(self.diameter.max()) / options.blur if self.diameter.numel() else 1.0
        self.rounds = math.ceil(math.log(max(ratio, 1.0)) / -math.log(scaling))

    def __call__(self, k: int) -> Tensor | float:
        """Return epsilon of round k, (*, 1) or a number."""
        if k >= self.rounds:
            return self.options.epsilon
        reach = (self.diameter * self.scaling**k).clamp(min=self.options.blur)
        return (reach**self.options.p)[..., None]


def alternate(
    kernel: SpaceKernel, log_a: Tensor, log_b: Tensor, options: SinkhornOptions
) -> tuple[Tensor, Tensor, int]:
    """Return the potentials f and g of ``OT_eps(a, b)`` and the rounds taken.

    Where convergence is watched, each epsilon on the way down is a station, settled roughly, as
    the potentials of the next one are near only then. Otherwise it has one round; of
    ``options.iterations`` rounds all but the last may go by in that.
    """
    watched = options.is_watched(kernel.x)
    annealing = Annealing(kernel.x, kernel.y, options, options.scaling)
    down, most = annealing.rounds, options.max_iterations if watched else _UNWATCHED_ROUNDS
    if options.iterations is not None:
        down = min(down, options.iterations - 1)
        most = options.iterations - down
    quick = kernel.rough(options.epsilon) if isinstance(kernel, StreamedKernel) else kernel
    g, taken, behind = torch.zeros_like(log_b), 0, Behind()
    for k in range(down):
        epsilon = annealing(k)
        if watched:
            g = behind.foreseen(quick, g, log_a, log_b, epsilon)
            station = _settle(quick, g, log_a, log_b, epsilon, _TOL_ON_THE_WAY, _ROUNDS_ON_THE_WAY)
            _, g, rounds, _ = station
            behind.pass_by(g, epsilon, steep=rounds > _EASY)
        else:
            _, g = quick.sweep(epsilon, log_a, log_b, g)
            rounds = 1
        taken += rounds
    tol = options.tol if watched else None
    f, g, rounds, error = _settle(kernel, g, log_a, log_b, options.epsilon, tol, most)
    if error is not None and error > options.tol:
        warn_unconverged(error, options, taken + rounds)
    on_host = kernel.x.device.type == "cpu" and not torch.compiler.is_compiling()
    if not (on_host and bool((log_b > -torch.inf).all())):  # a sweep leaves absent points out
        g = kernel.transposed.softmin(options.epsilon, log_a, f)
    return f, g, taken + rounds


def _settle(
    kernel: SpaceKernel, g: Tensor, log_a: Tensor, log_b: Tensor, epsilon: Tensor | float,
    tol: float | None, most: int,
) -> tuple[Tensor, Tensor, int, float | None]:  # fmt: skip
    """Go round at one epsilon, ``most`` times or to ``tol``: f, the g after it, rounds, error."""
    memory = Anderson(log_b)
    a, b = log_a.exp(), log_b.exp()
    taken, error = 0, None
    while taken < most:
        taken += 1
        f, following = kernel.sweep(epsilon, log_a, log_b, g)
        if tol is not None:
            # (f, g) misses b's marginal by b_j |exp((g_j - following_j) / eps) - 1|
            miss = (b * torch.expm1((g - following) / epsilon).abs()).sum(-1)
            error = float(miss.max()) if miss.numel() else 0.0
            if error <= tol:
                break
        g = memory.step(g, following, (a * f).sum(-1) + (b * g).sum(-1), epsilon)
    return f, following, taken, error


class Behind:
    """The last two stations of an annealing, and the line through their potentials.

    At small epsilons the potentials become linear in epsilon, with the face of the linear
    programme that the plan is on.
    """

    def __init__(self) -> None:
        self._stations: list[tuple[Tensor, Tensor | float]] = []
        self._steep = False

    def pass_by(self, g: Tensor, epsilon: Tensor | float, *, steep: bool) -> None:
        """Remember a station, and whether looking forward from it is worth two passes."""
        self._stations = [*self._stations[-1:], (g, epsilon)]
        self._steep = steep

    def foreseen(
        self, kernel: SpaceKernel, g: Tensor, log_a: Tensor, log_b: Tensor, epsilon: Tensor | float
    ) -> Tensor:
        """Return the g at epsilon on the line, or the last one where the dual is better there."""
        if len(self._stations) < 2 or not self._steep:
            return g
        (before, far), (last, near) = self._stations
        apart: Tensor | float = far - near
        if isinstance(apart, Tensor):
            apart = torch.where(apart > 0, apart, 1.0)
        line = last + (last - before) * ((near - epsilon) / apart)
        a, b = log_a.exp(), log_b.exp()

        def value(g: Tensor) -> Tensor:
            return (a * kernel.softmin(epsilon, log_b, g)).sum(-1) + (b * g).sum(-1)

        return torch.where((value(line) > value(g))[..., None], line, g)
