"""Solves p = 2 on a line between fewer points that stand for all: near-linear at any blur.

In each cell in which the plan is smooth some points with the cell's moments take the place of its
own (`quadrature`); the problem between those is solved, and its potentials are read at places from
which they are known at all points (`chebyshev`). Cells are made finer where the plan that was found
shows that they add more than ``tol`` to the error of the marginals (`fewer_points`).
"""

from __future__ import annotations

import numpy as np

from ...options import SinkhornOptions
from ..arrays import Array
from ..host_solver import Between, HostSolver, Within
from ..newton import HostKernel, missed, solve_self
from .fewer_points import FewerPoints
from .problem import read, solve_between, solve_within
from .ragged import Cloud, Ragged

# Times that cells may be made finer.
_REFINEMENTS = 6


class SmoothSolver(HostSolver):
    """Solves ``OT_eps`` of clouds, a row each.

    What it returns at points without weight is 0, but for potentials where they are asked for.
    """

    def __init__(self, options: SinkhornOptions, potentials: bool) -> None:
        super().__init__(options)
        self._potentials = potentials

    def between(self, x: Cloud, y: Cloud) -> Between:
        """Solve ``OT_eps(a, b)``."""
        epsilon, tol = self.epsilon, self.options.tol
        one = FewerPoints(x.present, y.present, epsilon, tol)
        other = FewerPoints(y.present, x.present, epsilon, tol)
        start, rounds = None, 0
        for left in range(_REFINEMENTS, -1, -1):
            plan = solve_between(one.light, other.light, epsilon, start, self._pair)
            rounds += plan.rounds
            error_a, ratio_a = one.judge(plan.x.deviation)
            error_b, ratio_b = other.judge(plan.y.deviation)
            if error_a + error_b <= tol or self.fixed or not left:
                self._check(error_a + error_b, rounds)
                break
            one.refine(ratio_a)
            start, _ = read(one.light, other.light, plan.y.potential, epsilon)
            other.refine(ratio_b)
        f, pull_x = one.read(plan.x, other.light, plan.y.potential)
        g, pull_y = other.read(plan.y, one.light, plan.x.potential)
        absent_f = absent_g = None
        if self._potentials:
            absent_f, _ = read(x.absent, other.light, plan.y.potential, epsilon)
            absent_g, _ = read(y.absent, one.light, plan.x.potential, epsilon)
        return Between(
            plan.cost, x.spread(f, absent_f), y.spread(g, absent_g), x.spread(pull_x),
            y.spread(pull_y), rounds,
        )  # fmt: skip

    def _heavy_ball(self, kernel: HostKernel, a: Array) -> tuple[Array, Array]:
        return self._self(kernel, a, solve_self)

    def within(self, clouds: list[Cloud]) -> list[Within]:
        """Solve ``OT_eps(a, a)`` of all rows of some clouds at once."""
        every = Ragged.join([cloud.present for cloud in clouds])
        fewer = FewerPoints(every, every, self.epsilon, self.options.tol)
        for left in range(_REFINEMENTS, -1, -1):
            plan = solve_within(fewer.light, self.epsilon, self._heavy_ball)
            error, ratio = fewer.judge(plan.x.deviation)
            if 2.0 * error <= self.options.tol or self.fixed or not left:
                self._check(2.0 * error, _REFINEMENTS)
                break
            fewer.refine(ratio)
        f, pull = fewer.read(plan.x, fewer.light, plan.x.potential)
        ends = np.add.accumulate([cloud.present.points.size for cloud in clouds])[:-1]
        rows = np.add.accumulate([cloud.present.count.size for cloud in clouds])[:-1]
        absent: list[Array | None] = [None] * len(clouds)
        if self._potentials:
            gone = Ragged.join([cloud.absent for cloud in clouds])
            least, _ = read(gone, fewer.light, plan.x.potential, self.epsilon)
            sizes = [cloud.absent.points.size for cloud in clouds]
            absent = list(np.split(least, np.add.accumulate(sizes)[:-1]))
        return [
            Within(cost, cloud.spread(potential, beside), cloud.spread(slope))
            for cloud, cost, potential, slope, beside in zip(
                clouds, np.split(plan.cost, rows), np.split(f, ends), np.split(pull, ends), absent,
                strict=True,
            )
        ]  # fmt: skip


def marginal_error(x: Cloud, y: Cloud, f: Array, g: Array, epsilon: float) -> Array:
    """Return the L1 error (R,) of x's marginal in the plan of potentials (R, N) and (R, M)."""
    one = x.present
    due, _ = read(one, y.present, y.take(g), epsilon)
    error: Array = np.add.reduceat(missed(one.weights, x.take(f), due, epsilon), one.starts)
    return error
