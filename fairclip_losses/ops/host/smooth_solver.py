"""Solves p = 2 on a line between fewer points that stand for all: near-linear at any blur.

In each cell in which the plan is smooth some points with the cell's moments take the place of its
own (`gauss_rule`); the problem between those is solved, and its potentials are read at places from
which they are known at all points (`chebyshev`). Of what a cell of ``h = k eps / sd`` adds to the
marginals' L1 error, ``r^-2q`` bounds the part, with q points a cell and r the radius of the ellipse
around it on which the nearest singularity may lie, ``r - 1 / r = 2 pi / k``. Cells are made finer
where the plan that was found shows that this adds up to more than ``tol``.
"""

from __future__ import annotations

import numpy as np

from ..options import SinkhornOptions
from .arrays import Array
from .cells import Cells, divide, refine
from .chebyshev import Places
from .gauss_problem import read, solve_between, solve_within
from .gauss_rule import compress
from .ragged import Cloud, Ragged
from .solver import Between, HostSolver, Within

# Points that stand for a cell.
_ORDER = 8
# Part of ``tol`` that cells are laid out for, and times that they may be made finer.
_PART, _REFINEMENTS = 0.25, 6


class SmoothSolver(HostSolver):
    """Solves ``OT_eps`` of clouds, a row each.

    What it returns at points without weight is 0, but for potentials where they are asked for.
    """

    def __init__(self, options: SinkhornOptions, potentials: bool) -> None:
        super().__init__(options)
        self._potentials = potentials
        radius = min(_PART * options.tol, 0.01) ** (-0.5 / _ORDER)
        self._longest = 2.0 * np.pi / (radius - 1.0 / radius)

    def between(self, x: Cloud, y: Cloud) -> Between:
        """Solve ``OT_eps(a, b)``."""
        one, other = x.present, y.present
        cells_a, cells_b = self._divide(one, other), self._divide(other, one)
        start, rounds = None, 0
        for left in range(_REFINEMENTS, -1, -1):
            light_a, light_b = compress(one, cells_a, _ORDER), compress(other, cells_b, _ORDER)
            plan = solve_between(light_a, light_b, self.epsilon, start, self._pair)
            rounds += plan.rounds
            ratio_a, error_a = self._judge(one, cells_a, light_a, plan.sd_x)
            ratio_b, error_b = self._judge(other, cells_b, light_b, plan.sd_y)
            if error_a + error_b <= self.options.tol or self.fixed or not left:
                break
            cells_a, cells_b = refine(one, cells_a, ratio_a), refine(other, cells_b, ratio_b)
            start, _ = read(compress(one, cells_a, _ORDER), light_b, plan.g, self.epsilon)
        f, pull_x = self._at_points(x, cells_a, light_b, plan.g)
        g, pull_y = self._at_points(y, cells_b, light_a, plan.f)
        return Between(plan.cost, f, g, pull_x, pull_y, rounds)

    def within(self, x: Cloud) -> Within:
        """Solve ``OT_eps(a, a)``."""
        one = x.present
        cells = self._divide(one, one)
        for left in range(_REFINEMENTS, -1, -1):
            light = compress(one, cells, _ORDER)
            plan = solve_within(light, self.epsilon, self._self)
            ratio, error = self._judge(one, cells, light, plan.sd_x)
            if 2.0 * error <= self.options.tol or self.fixed or not left:
                break
            cells = refine(one, cells, ratio)
        return Within(plan.cost, *self._at_points(x, cells, light, plan.f))

    def _divide(self, own: Ragged, other: Ragged) -> Cells:
        return divide(own, other, self.epsilon, _ORDER, self._longest)

    def _judge(self, own: Ragged, cells: Cells, light: Ragged, sd: Array) -> tuple[Array, float]:
        """Return each cell's length in units of what the plan allows, and the cells' error.

        That is the most that any row's cells add to the marginals' error. Cells that were left as
        they are add nothing, and their length is 0.
        """
        count = np.minimum(cells.sizes, _ORDER)
        starts = np.add.accumulate(count) - count
        length = own.points[cells.last] - own.points[cells.first]
        k = length * np.maximum.reduceat(sd, starts) / self.epsilon
        k[cells.sizes <= _ORDER] = 0.0
        pole = np.pi / np.maximum(k, 1e-6)
        radius = pole + np.sqrt(pole * pole + 1.0)
        mass = np.add.reduceat(light.weights, starts)
        error = np.add.reduceat(mass * radius ** (-2.0 * _ORDER), starts.searchsorted(light.starts))
        return k / self._longest, float(error.max())

    def _at_points(
        self, cloud: Cloud, cells: Cells, other: Ragged, g: Array
    ) -> tuple[Array, Array]:
        """Return the soft minimum of g at the points of the cloud, and how g pulls at them."""
        places = Places.of(cloud.present, cells, 2 * _ORDER)
        least, pull = places.fill(read(places.where, other, g, self.epsilon))
        absent = None
        if self._potentials:
            absent, _ = read(cloud.absent, other, g, self.epsilon)
        return cloud.spread(least, absent), cloud.spread(pull)


def missed(x: Cloud, y: Cloud, f: Array, g: Array, epsilon: float) -> Array:
    """Return the L1 error (R,) of x's marginal in the plan of potentials (R, N) and (R, M)."""
    one = x.present
    due, _ = read(one, y.present, y.take(g), epsilon)
    miss = one.weights * np.abs(np.expm1((x.take(f) - due) / epsilon))
    error: Array = np.add.reduceat(miss, one.starts)
    return error
