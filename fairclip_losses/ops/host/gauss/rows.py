"""Problems of p = 2 in rows, some at a time: their arrays stay small enough to be used again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..arrays import Array, Shape, stretch
from ..host_solver import Within
from .ragged import Cloud, Ordered
from .solver import SmoothSolver

# Points of all rows that are solved at once.
_AT_ONCE = 2**16


class Rows(NamedTuple):
    """A side of several problems: sorted points and weights, (1 or R, N)."""

    points: Ordered
    weights: Array
    number: int  # R

    @classmethod
    def of(cls, points: Tensor, weights: Tensor, lead: Shape) -> Rows:
        """Bring points (*, N, 1) and weights (*, N) to the rows of ``lead``, or to one."""

        def rows(values: Array) -> Array:
            few = math.prod(values.shape[:-1]) == 1
            return (values if few else stretch(values, lead)).reshape(-1, values.shape[-1])

        ordered = Ordered.of(rows(points.detach()[..., 0].numpy()))
        return cls(ordered, rows(weights.detach().numpy()), math.prod(lead))

    def cloud(self, rows: slice) -> Cloud:
        """Return some rows' measures."""
        weights = self.weights if len(self.weights) == 1 else self.weights[rows]
        count = min(rows.stop, self.number) - rows.start
        return Cloud(self.points.rows(rows), np.broadcast_to(weights, (count, weights.shape[-1])))

    def blocks(self, points: int) -> list[slice]:
        """Part the rows, of so many points."""
        size = max(_AT_ONCE // max(points, 1), 1)
        return [slice(start, start + size) for start in range(0, self.number, size)]


def clouds(one: Rows, other: Rows) -> Iterator[tuple[slice, Cloud, Cloud]]:
    """Yield some rows of both sides at a time."""
    for rows in one.blocks(max(one.weights.shape[-1], other.weights.shape[-1])):
        yield rows, one.cloud(rows), other.cloud(rows)


def within_blocks(solver: SmoothSolver, one: Rows, other: Rows) -> tuple[Within, Within]:
    """Solve the self-terms of both sides: all at once where they are small."""
    blocks = [[side.cloud(rows) for rows in side.blocks(side.weights.shape[-1])]
              for side in (one, other)]  # fmt: skip
    if sum(side.number * side.weights.shape[-1] for side in (one, other)) <= _AT_ONCE:
        first, second = solver.within([cloud for part in blocks for cloud in part])
        return first, second
    first, second = (Within.join([solver.within([cloud])[0] for cloud in part]) for part in blocks)
    return first, second
