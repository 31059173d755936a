"""The Gibbs kernel a block of rows at a time: any dimension, never all costs in memory.

A block costs one matrix product, one exponential and a few passes over numbers that the cache still
holds. In float64 the product's rounding moves an exponent by ``1e-16 (diameter / blur)^2``, 1e-8 at
a blur of 1e-4 of the diameter. In float32 the blocks take half of the time, for rounds that only
lead towards the solution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import broadcast_shapes, is_readable
from .blocks import Exponents, rows_of_clouds
from .costs import rounding, worst_rounding
from .dense import LOG2_E, DenseKernel, following

# Error of an exponent that a rough round may make.
_ROUGH = 1e-2
# Most entries of a rough kernel that stay in memory: 4 MiB.
_FEW = 2**20
# Largest power of two by which sums may miss the 1 that a near potential promises: float32 holds
# the terms that matter.
_RANGE = 60.0


class _Block(NamedTuple):
    """Some rows of the kernel under one row of weights."""

    row: int  # of the flattened leading dimensions
    points: slice  # of x
    exponents: Exponents  # between this pair of clouds
    weight: Tensor  # (n, M), b_j exp((g_j - C_ij) / eps) by some power of two, overwritten later
    total: Tensor  # (n,), its sum over j
    power: Tensor | float  # (n,) that power
    distance: Tensor | None  # (n, M), p = 1


class StreamedKernel:
    """As `DenseKernel`, with temporaries of a fixed size."""

    spare = 0.2

    def __init__(self, x: Tensor, y: Tensor, p: int, dtype: torch.dtype | None = None) -> None:
        """Hold the points; ``dtype`` is that of the blocks, by default the points' own."""
        self.x, self.y, self.p = x, y, p
        self._dtype = x.dtype if dtype is None else dtype

    @property
    def transposed(self) -> StreamedKernel:
        """The kernel from y to x."""
        return StreamedKernel(self.y, self.x, self.p, self._dtype)

    @cached_property
    def rounding(self) -> float:
        """See `DenseKernel.rounding`."""
        return rounding(self.x, self.y, self.p, self._dtype)

    @property
    def unit(self) -> float:
        """See `DenseKernel.unit`."""
        return torch.finfo(self._dtype).eps

    def single(self, epsilon: float) -> StreamedKernel | None:
        """Return the kernel in float32, or None where its exponents would keep no two digits.

        The reach of the points is read back, so elsewhere than on the host it is None too.
        """
        if not is_readable(self.x) or self._dtype != torch.float64 or not self.x.numel():
            return None
        if worst_rounding(self.x, self.y, self.p, torch.float32) > _ROUGH * epsilon:
            return None
        return StreamedKernel(self.x, self.y, self.p, torch.float32)

    def rough(self, epsilon: float, lead: Sequence[int]) -> StreamedKernel | DenseKernel:
        """Return the kernel of `single`, or itself; in memory if small under rows ``lead``."""
        quick = self.single(epsilon)
        rows = math.prod(broadcast_shapes(self.x.shape[:-2], self.y.shape[:-2], lead))
        if quick is None or rows * self.x.shape[-2] * self.y.shape[-2] > _FEW:
            return quick or self
        x = self.x.float()
        return DenseKernel(x, x if self.y is self.x else self.y.float(), self.p, rough=True)

    def softmin(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `DenseKernel.softmin`."""
        lead = self._lead(log_b, g)
        log2_sum = g.new_empty(math.prod(lead), self.x.shape[-2])
        for block in self._blocks(epsilon, log_b, g, None, lead):
            log2_sum[block.row, block.points] = block.total.log2() + block.power
        return log2_sum.view(*lead, -1).mul(-epsilon / LOG2_E)

    def sweep(
        self, epsilon: Tensor | float, log_a: Tensor, log_b: Tensor, g: Tensor,
        near: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `DenseKernel.sweep`: one pass, as a block of rows gives its part of the columns.

        ``near`` is a guess at f: what the kernel's entries are scaled by beforehand needs no
        maximum. Where it was a bad guess, there is a second pass.
        """
        lead = broadcast_shapes(self._lead(log_b, g), log_a.shape[:-1])
        a = log_a.exp().to(self._dtype).expand(*lead, -1).reshape(-1, log_a.shape[-1])
        log2_sum, reached = g.new_empty(a.shape), a.new_zeros(a.shape[0], self.y.shape[-2])
        near = near if is_readable(self.x) else None
        for block in self._blocks(epsilon, log_b, g, near, lead):
            log2_sum[block.row, block.points] = block.total.log2() + block.power
            share = a[block.row, block.points] / block.total
            reached[block.row].addmv_(block.weight.T, share)
            del block  # see `_blocks`
        if near is not None and not bool((log2_sum.abs() < _RANGE).all()):
            return self.sweep(epsilon, log_a, log_b, g)
        f = log2_sum.view(*lead, -1).mul(-epsilon / LOG2_E)
        f = f if near is None else near + f
        return f, following(epsilon, log_b, g, reached.view(*lead, -1).to(g.dtype))

    def softmin_again(self, epsilon: float, log_a: Tensor, f: Tensor) -> Tensor:
        """``softmin(epsilon, log_a, f)``, where y is x for half of the time.

        With ``K_ij = exp((f_i + f_j - C_ij) / eps)``, a symmetric matrix, it is
        ``f_i - eps log sum_j K_ij a_j``: a block above the diagonal serves its rows and columns. f
        is near the solution, or 0, so that K neither overflows nor vanishes; where it does, or
        where testing that would wait for the device, this is ``softmin`` itself.
        """
        if not is_readable(self.x) or self.x is not self.y:
            return self.softmin(epsilon, log_a, f)
        lead = self._lead(log_a, f)
        there = log_a > -torch.inf
        a = log_a.exp().to(self._dtype).expand(*lead, -1).reshape(-1, log_a.shape[-1])
        sums = torch.zeros_like(a)
        height = torch.where(there, LOG2_E / epsilon * f, -torch.inf)
        for row, start, stop, kernel in self._above_diagonal(epsilon, height, lead):
            sums[row, start:stop].addmv_(kernel, a[row, start:])
            sums[row, stop:].addmv_(kernel[:, stop - start :].T, a[row, start:stop])
        sums = sums.view(*lead, -1).to(f.dtype)
        if not bool(((sums > 0) & sums.isfinite() | ~there).all()):
            return self.softmin(epsilon, log_a, f)
        return torch.where(there, f - epsilon * sums.log(), f)

    def average(self, epsilon: float, log_b: Tensor, g: Tensor, values: Tensor) -> Tensor:
        """See `DenseKernel.average`."""
        lead = broadcast_shapes(self._lead(log_b, g), values.shape[:-1])
        values = values.to(self._dtype).expand(*lead, -1).reshape(-1, values.shape[-1])
        mean = g.new_empty(values.shape[0], self.x.shape[-2])
        for block in self._blocks(epsilon, log_b, g, None, lead):
            mean[block.row, block.points] = block.weight.mv(values[block.row]) / block.total
        return mean.view(*lead, -1)

    def pull(self, epsilon: float, log_b: Tensor, g: Tensor, less: Tensor | None = None) -> Tensor:
        """See `DenseKernel.pull`; ``less`` is subtracted, and its memory used."""
        return self.pull_and_error(epsilon, log_b, g, less)[0]

    def pull_and_error(
        self, epsilon: float, log_b: Tensor, g: Tensor, less: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`pull` with an estimate of what rounding makes of each row, (*, N)."""
        lead = self._lead(log_b, g)
        shape = (*lead, *self.x.shape[-2:])
        if less is None or less.shape != shape:
            zeros = self.x.new_zeros(shape, dtype=self._dtype)
            less = zeros if less is None else less.expand(shape).clone()
        rows = less.view(-1, *shape[-2:])
        error = rows.new_empty(rows.shape[:2])
        for block in self._blocks(epsilon, log_b, g, None, lead):
            at = (block.row, block.points)
            pull, error[at] = block.exponents.pull(
                block.points, block.weight, block.total, block.distance
            )
            torch.sub(pull, rows[at], out=rows[at])
            del block  # see `_blocks`
        return less, error.mul_(self.unit).view(shape[:-1])

    def _above_diagonal(
        self, epsilon: float, height: Tensor, lead: torch.Size
    ) -> Iterator[tuple[int, int, int, Tensor]]:
        """Yield blocks of ``2^(h_i + h_j) exp(-C_ij / eps)`` where y is x.

        Each has its row of heights, the rows from start to stop and all columns from start on.
        """
        n = self.x.shape[-2]
        for rows, exponents in self.exponents(epsilon, height, height, lead, whole=False):
            stop = 0
            while stop < n:
                start, stop = stop, min(stop + max(exponents.size // (n - stop), 1), n)
                for row, power, _ in exponents.walk(slice(start, stop), slice(start, n)):
                    yield rows[row], start, stop, power.exp2_()

    def _lead(self, log_b: Tensor, g: Tensor) -> torch.Size:
        return broadcast_shapes(
            self.x.shape[:-2], self.y.shape[:-2], log_b.shape[:-1], g.shape[:-1]
        )

    def _blocks(
        self, epsilon: Tensor | float, log_b: Tensor, g: Tensor, near: Tensor | None,
        lead: torch.Size,
    ) -> Iterator[_Block]:  # fmt: skip
        """Walk through the kernel, its rows scaled by a near potential or by their largest."""
        scale = LOG2_E / epsilon
        rows, columns = 0.0 * scale if near is None else scale * near, log_b * LOG2_E + scale * g
        for here, exponents in self.exponents(epsilon, rows, columns, lead, whole=True):
            n, m = self.x.shape[-2], self.y.shape[-2]
            count = max(exponents.size // m, 1)
            for start in range(0, n, count):
                points = slice(start, min(start + count, n))
                for row, exponent, distance in exponents.walk(points, slice(0, m)):
                    power: Tensor | float = 0.0
                    if near is None:
                        power = exponent.amax(-1)
                        exponent.sub_(power[:, None])
                    weight = exponent.exp2_()
                    total = weight.sum(-1)
                    yield _Block(here[row], points, exponents, weight, total, power, distance)
                    del exponent, weight, distance  # the memory, before the next ones take more

    def exponents(
        self, epsilon: Tensor | float, rows: Tensor | float, columns: Tensor, lead: torch.Size,
        *, whole: bool,
    ) -> Iterator[tuple[list[int], Exponents]]:  # fmt: skip
        """Yield the exponents of each pair of clouds, with the rows of weights on it."""
        clouds = broadcast_shapes(self.x.shape[:-2], self.y.shape[:-2])
        xs, ys = (points.expand(*clouds, *points.shape[-2:]) for points in (self.x, self.y))
        rows = torch.as_tensor(rows, dtype=columns.dtype, device=columns.device)
        rows = rows.expand(*lead, self.x.shape[-2]).reshape(-1, self.x.shape[-2])
        columns = columns.expand(*lead, -1).reshape(-1, columns.shape[-1])
        scale: Tensor | float = LOG2_E / epsilon
        scales = scale.expand(*lead, 1).reshape(-1) if isinstance(scale, Tensor) else None
        for cloud, here in rows_of_clouds(lead, clouds):
            x = xs[cloud]
            y = x if self.x is self.y else ys[cloud]
            scale = scale if scales is None else scales[here[0]]
            heights = rows[here], columns[here]
            yield here, Exponents(x, y, self.p, scale, *heights, self._dtype, whole)
