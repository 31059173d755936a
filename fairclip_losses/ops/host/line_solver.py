"""From a kernel on the points of a line to solved problems, between measures and within."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..checks import warn_unconverged
from ..options import SinkhornOptions
from .arrays import Array
from .gauss import GaussKernel, quadratic_start
from .laplace import LaplaceKernel, linear_start
from .newton import HostKernel, Look, log_weights, solve_pair, solve_self

# Most rounds of Newton's, and of the heavy ball of the self-terms, where no number is asked for.
_ROUNDS, _SELF_ROUNDS = 40, 100
# Numbers in an array of all rows above which rows are solved one block after the other.
_AT_ONCE = 2**18


class Between(NamedTuple):
    """A solved problem between two measures, a row each."""

    cost: Array  # (R,)
    f: Array  # (R, K)
    g: Array
    pull_x: Array  # (R, K) gradient of the cost in each point, per unit of its mass
    pull_y: Array
    rounds: int


class Within(NamedTuple):
    """A solved problem of measures against themselves."""

    cost: Array  # (R,)
    f: Array  # (R, K)
    pull: Array  # (R, K)


class LineSolver:
    """Solves on the sorted points z (K,) of a line, with one kernel for everything."""

    def __init__(self, z: Array, options: SinkhornOptions) -> None:
        self.z, self.options = z, options
        self.epsilon, self.fixed = options.epsilon, options.iterations is not None

    def between(self, a: Array, b: Array) -> Between:
        """Solve ``OT_eps(a, b)`` for weights a (1 or R, K) and b (R, K)."""
        parts = self._row_blocks(len(b))
        if len(parts) > 1:
            found = [self.between(a if len(a) == 1 else a[rows], b[rows]) for rows in parts]
            cost, f, g, pull_x, pull_y = (
                np.concatenate(part) for part in zip(*(s[:5] for s in found), strict=True)
            )
            return Between(cost, f, g, pull_x, pull_y, max(s.rounds for s in found))
        f = (linear_start if self.options.p == 1 else quadratic_start)(self.z, a, b)
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
    def _kernel(self) -> HostKernel:
        if self.options.p == 1:
            return LaplaceKernel(self.z, self.epsilon)
        return GaussKernel(self.z[None], self.z[None], self.epsilon)

    def _pair(self, kernel: HostKernel, a: Array, b: Array, f: Array) -> tuple[Look, int]:
        rounds = self.options.iterations or min(_ROUNDS, self.options.max_iterations)
        best, taken = solve_pair(kernel, a, b, f, self.options.tol, rounds, self.fixed)
        error = float(best.error.max())
        if error > self.options.tol and not self.fixed:
            warn_unconverged(error, self.options, taken)
        return best, taken

    def _own(self, kernel: HostKernel, a: Array) -> Within:
        rounds = self.options.iterations or min(_SELF_ROUNDS, self.options.max_iterations)
        before, after = solve_self(kernel, a, self.options.tol, rounds, self.fixed)
        pull = kernel.pull(log_weights(a) + before / self.epsilon)
        return Within((a * (before + after)).sum(-1), after, pull)


class RaggedSolver(LineSolver):
    """Solves p = 2 with a kernel to the points of b alone that have weight, a row its own.

    What it returns of b's side is 0 at the others, but for potentials where they are asked for.
    """

    def __init__(self, z: Array, options: SinkhornOptions, potentials: bool) -> None:
        super().__init__(z, options)
        self.potentials = potentials

    def between(self, a: Array, b: Array) -> Between:
        """See `LineSolver`; Newton's equations are those of b's points."""
        places, weights = self._present(b)
        kernel = GaussKernel(self.z[places], self.z[None], self.epsilon)
        g = np.take_along_axis(quadratic_start(self.z, b, a), places, -1)
        best, rounds = self._pair(kernel, weights, a, g)
        cost = (weights * best.due).sum(-1) + (a * best.g).sum(-1)
        pull_x = kernel.transposed.pull(log_weights(weights) + best.due / self.epsilon)
        pull_y = kernel.pull(log_weights(a) + best.g / self.epsilon)
        full = [self._spread(part, places, weights) for part in (best.due, pull_y)]
        if self.potentials:
            exponent = np.broadcast_to(log_weights(a) + best.g / self.epsilon, b.shape)
            by_row = [self._kernel.log_product(row[None]) for row in exponent]
            full[0] = -self.epsilon * np.concatenate(by_row)
        return Between(cost, best.g, full[0], pull_x, full[1], rounds)

    def within(self, a: Array, b: Array) -> tuple[Within, Within]:
        """See `LineSolver`."""
        places, weights = self._present(b)
        points = self.z[places]
        own = self._own(GaussKernel(points, points, self.epsilon), weights)
        full = [self._spread(part, places, weights) for part in (own.f, own.pull)]
        if self.potentials:
            kernel = GaussKernel(self.z[None], points, self.epsilon)
            product = kernel.log_product(log_weights(weights) + own.f / self.epsilon)
            full[0] = -self.epsilon * product
        return self._own(self._kernel, a), Within(own.cost, *full)

    def _present(self, b: Array) -> tuple[Array, Array]:
        """Return places and weights (R, M) of each row's points, 0 beyond what it has."""
        there = b > 0
        most = int(there.sum(-1).max())
        places = np.argsort(~there, -1, kind="stable")[:, :most]
        return places, np.take_along_axis(b, places, -1)

    def _spread(self, values: Array, places: Array, weights: Array) -> Array:
        spread = np.zeros((len(places), self.z.size))
        np.put_along_axis(spread, places, np.where(weights > 0, values, 0.0), -1)
        return spread
