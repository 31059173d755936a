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

    Of ``options.iterations`` rounds all but the last may go by in the annealing.
    """
    watched = options.is_watched(kernel.x)
    annealing = Annealing(kernel.x, kernel.y, options, options.scaling)
    down, rounds = annealing.rounds, _UNWATCHED_ROUNDS
    if options.iterations is not None:
        down, rounds = min(down, options.iterations - 1), options.iterations
    elif watched:
        rounds = down + options.max_iterations
    g = torch.zeros_like(log_b)
    quick = kernel.rough(options.epsilon) if isinstance(kernel, StreamedKernel) else kernel
    for k in range(down):
        _, g = quick.sweep(annealing(k), log_a, log_b, g)
    epsilon, memory = options.epsilon, Anderson(log_b)
    a, b = log_a.exp(), log_b.exp()
    taken = rounds
    for k in range(down, rounds):
        f, following = kernel.sweep(epsilon, log_a, log_b, g)
        if watched:
            # (f, g) misses b's marginal by b_j |exp((g_j - following_j) / eps) - 1|
            miss = (b * torch.expm1((g - following) / epsilon).abs()).sum(-1)
            if not bool((miss > options.tol).any()):
                taken = k + 1
                break
        g = memory.step(g, following, (a * f).sum(-1) + (b * g).sum(-1), epsilon)
    else:
        if watched:
            warn_unconverged(float(miss.max()), options, rounds)
    on_host = kernel.x.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and bool((log_b > -torch.inf).all()):  # a sweep leaves absent points out
        return f, following, taken
    return f, kernel.transposed.softmin(epsilon, log_a, f), taken
