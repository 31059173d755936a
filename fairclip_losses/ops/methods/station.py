"""Accelerated alternate updates at one epsilon."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..kernels.kinds import SpaceKernel
from .anderson import Anderson
from .progress import Progress, marginal_error


class Station(NamedTuple):
    """Where the rounds at one epsilon ended."""

    f: Tensor | None
    g: Tensor  # that answers f
    rounds: int
    error: float | None  # L1 of the marginals, where it was looked at
    ahead: Tensor | None = None  # the g of a round more


def settle(
    kernel: SpaceKernel, at: Station, log_a: Tensor, log_b: Tensor, epsilon: Tensor | float,
    progress: Progress | None, most: int, memory: Anderson | None = None,
) -> Station:  # fmt: skip
    """Go round at one epsilon, until ``progress`` ends it, ``most`` times at most.

    With the ``memory`` that it ended with, and from ``ahead``, rounds go on as if they had not.
    """
    if progress is not None:
        progress.expect_rounding(kernel, epsilon)
    if memory is None:
        memory = Anderson(log_b, kernel.rounding if progress is not None else 0.0)
    a, b = log_a.exp(), log_b.exp()
    f, g, *_ = at
    taken, error = 0, None
    while taken < most:
        taken += 1
        f, following = kernel.sweep(epsilon, log_a, log_b, g, f)
        if progress is not None:
            error = marginal_error(b, g, following, epsilon)
            if progress.ends(error):
                break
        g = memory.step(g, following, (a * f).sum(-1) + (b * g).sum(-1), epsilon)
    return Station(f, following, taken, error, g)
