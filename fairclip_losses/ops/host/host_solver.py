"""What the solvers on the CPU return, and how they iterate."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..checks import warn_unconverged
from ..options import SinkhornOptions
from .arrays import Array
from .newton import HostKernel, Look, solve_pair, solve_self

# Most rounds of Newton's, and of the heavy ball of the self-terms, where no number is asked for.
_ROUNDS, _SELF_ROUNDS = 40, 100


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
        error = float(best.error.max())
        if error > self.options.tol and not self.fixed:
            warn_unconverged(error, self.options, taken)
        return best, taken

    def _self(self, kernel: HostKernel, a: Array) -> tuple[Array, Array]:
        return solve_self(kernel, a, self.options.tol, self._self_rounds, self.fixed)

    @property
    def _self_rounds(self) -> int:
        return self.options.iterations or min(_SELF_ROUNDS, self.options.max_iterations)
