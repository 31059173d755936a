"""Epsilon on its way down to the target, and what the potentials passed on it foretell."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import is_readable
from ..kernels.kinds import SpaceKernel
from ..options import SinkhornOptions

# Diameters over blurs that annealing then goes through; surplus rounds run at the target.
_UNWATCHED_RANGE = 1e4


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
        if reach.dim() == 0 and is_readable(reach):
            return float(reach) ** self.options.p
        return (reach**self.options.p)[..., None]


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
        elif apart == 0:
            return g
        line = last + (last - before) * ((near - epsilon) / apart)
        a, b = log_a.exp(), log_b.exp()

        def value(g: Tensor) -> Tensor:
            return (a * kernel.softmin(epsilon, log_b, g)).sum(-1) + (b * g).sum(-1)

        return torch.where((value(line) > value(g))[..., None], line, g)
