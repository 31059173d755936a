"""Solves p = 1 on the points of a line: problems between measures and within."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from ...options import SinkhornOptions
from ..arrays import Array
from ..host_solver import Between, HostSolver, Within
from ..newton import log_weights
from .kernel import LaplaceKernel
from .self_terms import solve_self_by_newton
from .start import local_start

# Numbers in an array of all rows above which rows are solved one block after the other.
_AT_ONCE = 2**16


class LineSolver(HostSolver):
    """Solves p = 1 on the sorted points z (K,) of a line, with one kernel for everything."""

    def __init__(self, z: Array, options: SinkhornOptions) -> None:
        super().__init__(options)
        self.z = z
        self._rows_at_once = max(_AT_ONCE // z.size, 1)

    def between(self, a: Array, b: Array) -> Between:
        """Solve ``OT_eps(a, b)`` for weights a (1 or R, K) and b (R, K)."""
        if len(b) <= self._rows_at_once:
            return self._between(a, b)
        f, g, pull_x, pull_y = (np.empty(b.shape) for _ in range(4))
        found = Between(np.empty(len(b)), f, g, pull_x, pull_y, 0)
        for rows in self._row_blocks(len(b)):
            some = self._between(a if len(a) == 1 else a[rows], b[rows])
            for whole, part in zip(found[:5], some[:5], strict=True):
                whole[rows] = part
            found = found._replace(rounds=max(found.rounds, some.rounds))
        return found

    def _between(self, a: Array, b: Array) -> Between:
        kernel = self._kernel
        best, rounds = self._pair(kernel, a, b, local_start(kernel, a, b))
        pull_x = kernel.pull(log_weights(b) + best.g / self.epsilon)
        pull_y = kernel.pull(log_weights(a) + best.due / self.epsilon)
        cost = (a * best.due).sum(-1) + (b * best.g).sum(-1)
        return Between(cost, best.due, best.g, pull_x, pull_y, rounds)

    def within(self, a: Array, b: Array) -> tuple[Within, Within]:
        """Solve ``OT_eps(a, a)`` and ``OT_eps(b, b)``."""
        if len(a) + len(b) <= self._rows_at_once:
            both = self._own(np.concatenate([a, b]))
            one, other = ([part[rows] for part in both] for rows in np.s_[: len(a), len(a) :])
            return Within(*one), Within(*other)
        return self._own_rows(a), self._own_rows(b)

    def _own_rows(self, a: Array) -> Within:
        found = Within(np.empty(len(a)), np.empty(a.shape), np.empty(a.shape))
        for rows in self._row_blocks(len(a)):
            for whole, part in zip(found, self._own(a[rows]), strict=True):
                whole[rows] = part
        return found

    def _row_blocks(self, rows: int) -> list[slice]:
        size = self._rows_at_once
        return [slice(k, min(k + size, rows)) for k in range(0, rows, size)]

    @cached_property
    def _kernel(self) -> LaplaceKernel:
        return LaplaceKernel(self.z, self.epsilon)

    def _own(self, a: Array) -> Within:
        kernel = self._kernel
        before, after = self._self(kernel, a, solve_self_by_newton)
        pull = kernel.pull(log_weights(a) + before / self.epsilon)
        return Within((a * (before + after)).sum(-1), after, pull)
