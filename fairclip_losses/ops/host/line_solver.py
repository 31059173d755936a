"""Solves p = 1 on the points of a line: problems between measures and within."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from ..options import SinkhornOptions
from .arrays import Array
from .laplace import LaplaceKernel, linear_start
from .newton import log_weights
from .solver import Between, HostSolver, Within

# Numbers in an array of all rows above which rows are solved one block after the other.
_AT_ONCE = 2**18


class LineSolver(HostSolver):
    """Solves p = 1 on the sorted points z (K,) of a line, with one kernel for everything."""

    def __init__(self, z: Array, options: SinkhornOptions) -> None:
        super().__init__(options)
        self.z = z

    def between(self, a: Array, b: Array) -> Between:
        """Solve ``OT_eps(a, b)`` for weights a (1 or R, K) and b (R, K)."""
        parts = self._row_blocks(len(b))
        if len(parts) > 1:
            found = [self.between(a if len(a) == 1 else a[rows], b[rows]) for rows in parts]
            cost, f, g, pull_x, pull_y = (
                np.concatenate(part) for part in zip(*(s[:5] for s in found), strict=True)
            )
            return Between(cost, f, g, pull_x, pull_y, max(s.rounds for s in found))
        f = linear_start(self.z, a, b)
        best, rounds = self._pair(self._kernel, a, b, f)
        exponents = [
            log_weights(b) + best.g / self.epsilon,
            log_weights(a) + best.due / self.epsilon,
        ]
        pulls = self._kernel.pull(np.concatenate(exponents))
        cost = (a * best.due).sum(-1) + (b * best.g).sum(-1)
        return Between(cost, best.due, best.g, pulls[: len(f)], pulls[len(f) :], rounds)

    def within(self, a: Array, b: Array) -> tuple[Within, Within]:
        """Solve ``OT_eps(a, a)`` and ``OT_eps(b, b)``, all rows at once."""
        every = np.concatenate([a, b])
        found = [self._own(self._kernel, every[rows]) for rows in self._row_blocks(len(every))]
        both = [np.concatenate(part) for part in zip(*found, strict=True)]
        one, other = zip(*(np.split(part, [len(a)]) for part in both), strict=True)
        return Within(*one), Within(*other)

    def _row_blocks(self, rows: int) -> list[slice]:
        """Return rows that are solved at once: their arrays are small enough to be used again."""
        size = max(_AT_ONCE // self.z.size, 1)
        return [slice(k, min(k + size, rows)) for k in range(0, rows, size)]

    @cached_property
    def _kernel(self) -> LaplaceKernel:
        return LaplaceKernel(self.z, self.epsilon)

    def _own(self, kernel: LaplaceKernel, a: Array) -> Within:
        before, after = self._self(kernel, a)
        pull = kernel.pull(log_weights(a) + before / self.epsilon)
        return Within((a * (before + after)).sum(-1), after, pull)
