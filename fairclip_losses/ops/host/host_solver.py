"""What the solvers on the CPU return, and how they iterate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..options import SinkhornOptions, warn_unconverged
from .arrays import Array
from .newton import HostKernel, Look, missed, solve_pair

# Most rounds of Newton's, and of the heavy ball of the self-terms, where no number is asked for.
_ROUNDS, _SELF_ROUNDS = 40, 100


SolveSelf = Callable[[Any, Array, float, int, bool], tuple[Array, Array]]


class Between(NamedTuple):
    """A solved problem between two measures, a row each."""

    cost: Array  # (R,)
    f: Array  # (R, N)
    g: Array  # (R, M)
    pull_x: Array  # (R, N) gradient of the cost in each point, per unit of its mass
    pull_y: Array  # (R, M)
    rounds: int

    @classmethod
    def join(cls, parts: list[Between]) -> Between:
        """Put the rows of one solution after those of the other."""
        cost, f, g, pull_x, pull_y = (
            np.concatenate(part) for part in zip(*(some[:5] for some in parts), strict=True)
        )
        return cls(cost, f, g, pull_x, pull_y, max(some.rounds for some in parts))


class Within(NamedTuple):
    """A solved problem of measures against themselves."""

    cost: Array  # (R,)
    f: Array  # (R, N)
    pull: Array  # (R, N)

    @classmethod
    def join(cls, parts: list[Within]) -> Within:
        """Put the rows of one solution after those of the other."""
        return cls(*(np.concatenate(part) for part in zip(*parts, strict=True)))


class HostSolver:
    """Iterates until the options are met, and says where they are not."""

    def __init__(self, options: SinkhornOptions) -> None:
        self.options, self.epsilon = options, options.epsilon
        self.fixed = options.iterations is not None

    def _pair(self, kernel: HostKernel, a: Array, b: Array, f: Array) -> tuple[Look, int]:
        rounds = self.options.iterations or min(_ROUNDS, self.options.max_iterations)
        best, taken = solve_pair(kernel, a, b, f, self.options.tol, rounds, self.fixed)
        self._check(float(best.error.max()), taken)
        return best, taken

    def _self(self, kernel: HostKernel, a: Array, solve: SolveSelf) -> tuple[Array, Array]:
        tol = self.options.tol
        rounds = self.options.iterations or min(_SELF_ROUNDS, self.options.max_iterations)
        before, after = solve(kernel, a, tol, rounds, self.fixed)
        if not self.fixed:
            error = missed(a, before, after, kernel.epsilon).sum(-1)
            self._check(float(error.max()), rounds)
        return before, after

    def _check(self, error: float, rounds: int) -> None:
        """Warn of an error of the marginals above ``tol``; NaN is no convergence either."""
        if not (error <= self.options.tol or self.fixed):
            warn_unconverged(error, self.options, rounds)
