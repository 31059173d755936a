"""The Gibbs kernel a block of rows at a time: any dimension, never all costs in memory.

A block costs one matrix product, one exponential and a few passes over numbers that the cache still
holds: with h_j all that depends on j alone, the exponent of p = 2 is ``x_i . y_j / eps + h_j``, up
to a term of i alone that the sums over j do not need. Exponents are powers of two, which processors
raise faster than e. In float64 the product's rounding moves an exponent by ``1e-16 (diameter /
blur)^2``, 1e-8 at a blur of 1e-4 of the diameter. In float32 the blocks take half of the time, for
rounds that only lead towards the solution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import broadcast_shapes
from .dense import following

# Entries of a block: 1 MiB of float64, which the caches of most processors hold; more where a
# launch costs more than a pass.
_BLOCK, _BLOCK_OF_ACCELERATOR = 2**17, 2**20
# Largest D for which p = 1 takes distances from differences, not from products: those lose half of
# the digits of points much nearer to each other than to the mean.
_DIFFERENCES = 8
# Error of an exponent that a rough round may make.
_ROUGH = 1e-2
# Largest D at which the product adds the height of a single row of weights: as fast as it may be,
# that copies y.
_JOINED = 16
_LOG2_E, _LN_2 = math.log2(math.e), math.log(2.0)


class _Block(NamedTuple):
    """Some rows of the kernel under one row of weights."""

    row: int  # of the flattened leading dimensions
    points: slice  # of x
    x: Tensor  # (n, D)
    y: Tensor  # (M, D)
    weight: Tensor  # (n, M), b_j exp((g_j - C_ij) / eps) over its largest entry, overwritten later
    total: Tensor  # (n, 1), its sum over j
    log2_sum: Tensor  # (n,) of the whole, up to `_offset`
    distance: Tensor | None  # (n, M), p = 1


class StreamedKernel:
    """As `DenseKernel`, with temporaries of a fixed size."""

    def __init__(self, x: Tensor, y: Tensor, p: int, dtype: torch.dtype | None = None) -> None:
        """Hold the points; ``dtype`` is that of the blocks, by default the points' own."""
        self.x, self.y, self.p = x, y, p
        self._dtype = x.dtype if dtype is None else dtype
        self._blocks_x = x.to(self._dtype)
        self._blocks_y = self._blocks_x if y is x else y.to(self._dtype)

    @property
    def transposed(self) -> StreamedKernel:
        """The kernel from y to x."""
        other = object.__new__(StreamedKernel)
        other.x, other.y, other.p, other._dtype = self.y, self.x, self.p, self._dtype
        other._blocks_x, other._blocks_y = self._blocks_y, self._blocks_x
        return other

    def rough(self, epsilon: float) -> StreamedKernel:
        """Return the kernel in float32 where its exponents keep two digits at epsilon, or itself.

        The reach of the points is read back, so elsewhere than on the host it is itself too.
        """
        on_host = self.x.device.type == "cpu" and not torch.compiler.is_compiling()
        if not on_host or self._dtype != torch.float64 or not self.x.numel():
            return self
        reach = max(float(points.abs().max()) for points in (self.x, self.y))
        squares = reach**2 * self.x.shape[-1]
        lost = squares if self.p == 2 else squares**0.5
        if self.p == 1 and self.x.shape[-1] > _DIFFERENCES:
            lost *= torch.finfo(torch.float32).eps ** -0.5
        if lost * torch.finfo(torch.float32).eps > _ROUGH * epsilon:
            return self
        return StreamedKernel(self.x, self.y, self.p, torch.float32)

    def softmin(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `DenseKernel.softmin`."""
        lead = self._lead(log_b, g)
        log2_sum = g.new_empty(math.prod(lead), self.x.shape[-2])
        for block in self._blocks(epsilon, log_b, g, lead):
            log2_sum[block.row, block.points] = block.log2_sum
        return self._offset() - epsilon * _LN_2 * log2_sum.view(*lead, -1)

    def sweep(
        self, epsilon: Tensor | float, log_a: Tensor, log_b: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `DenseKernel.sweep`: one pass, as a block of rows gives its part of the columns."""
        lead = broadcast_shapes(self._lead(log_b, g), log_a.shape[:-1])
        a = log_a.exp().to(self._dtype).expand(*lead, -1).reshape(-1, log_a.shape[-1])
        log2_sum = g.new_empty(a.shape)
        reached = a.new_zeros(a.shape[0], self.y.shape[-2])
        for block in self._blocks(epsilon, log_b, g, lead):
            log2_sum[block.row, block.points] = block.log2_sum
            share = a[block.row, block.points] / block.total[:, 0]
            reached[block.row].addmv_(block.weight.T, share)
        f = self._offset() - epsilon * _LN_2 * log2_sum.view(*lead, -1)
        return f, following(epsilon, log_b, g, reached.view(*lead, -1).to(g.dtype))

    def softmin_self(self, epsilon: float, log_a: Tensor, f: Tensor) -> Tensor:
        """``softmin(epsilon, log_a, f)`` where y is x, for half of the time.

        With ``K_ij = exp((f_i + f_j - C_ij) / eps)``, a symmetric matrix, it is
        ``f_i - eps log sum_j K_ij a_j``: a block above the diagonal serves its rows and columns. f
        is near the solution, or 0, so that K neither overflows nor vanishes; where it does, or
        where testing that would wait for the device, this is ``softmin`` itself.
        """
        if self.x.device.type != "cpu" or torch.compiler.is_compiling() or self.x is not self.y:
            return self.softmin(epsilon, log_a, f)
        lead = broadcast_shapes(self._lead(log_a, f))
        there = log_a > -torch.inf
        a = log_a.exp().to(self._dtype).expand(*lead, -1).reshape(-1, log_a.shape[-1])
        height = _LOG2_E / epsilon * f
        if self.p == 2:
            height = height - (0.5 * _LOG2_E / epsilon) * self.x.square().sum(-1)
        height = torch.where(there, height, -torch.inf).to(self._dtype)
        height = _finite(height.expand(*lead, -1).reshape(-1, height.shape[-1]))
        sums = torch.zeros_like(a)
        xs = self._blocks_x.expand(*self.x.shape[:-2], *self.x.shape[-2:])
        for cloud, rows in _rows_of_clouds(lead, self.x.shape[:-2]):
            self._add_symmetric(xs[cloud], _LOG2_E / epsilon, height[rows], a[rows], rows, sums)
        sums = sums.view(*lead, -1).to(f.dtype)
        if not bool(((sums > 0) & sums.isfinite() | ~there).all()):
            return self.softmin(epsilon, log_a, f)
        return torch.where(there, f - epsilon * sums.log(), f)

    def _add_symmetric(
        self, x: Tensor, scale: float, height: Tensor, a: Tensor, rows: list[int], sums: Tensor
    ) -> None:
        n = x.shape[0]
        buffers = x.new_empty(2, max(_BLOCK, n))
        joined = self.p == 2 and len(rows) == 1 and x.shape[-1] <= _JOINED
        if joined:
            one = torch.ones_like(height)
            left = torch.cat([scale * x, one.T, height.T], -1)
            right = torch.cat([x.T, height, one])
        start = 0
        while start < n:
            stop = min(start + max(_BLOCK // (n - start), 1), n)
            shape = (stop - start, n - start)
            products, exponents = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
            if joined:
                torch.mm(left[start:stop], right[:, start:], out=products)
            elif self.p == 2:
                torch.mm(scale * x[start:stop], x[start:].T, out=products)
            else:
                products = self._distance(x[start:stop], x[start:], products, 0).mul_(-scale)
            for row, high, weight in zip(rows, height, a, strict=True):
                kernel = products
                if not joined:
                    kernel = torch.add(products, high[start:], out=exponents)
                    kernel.add_(high[start:stop, None])
                kernel.exp2_()
                sums[row, start:stop].addmv_(kernel, weight[start:])
                sums[row, stop:].addmv_(kernel[:, stop - start :].T, weight[start:stop])
            start = stop

    def average(self, epsilon: float, log_b: Tensor, g: Tensor, values: Tensor) -> Tensor:
        """See `DenseKernel.average`."""
        lead = broadcast_shapes(self._lead(log_b, g), values.shape[:-1])
        values = values.to(self._dtype).expand(*lead, -1).reshape(-1, values.shape[-1])
        mean = g.new_empty(values.shape[0], self.x.shape[-2])
        for block in self._blocks(epsilon, log_b, g, lead):
            mean[block.row, block.points] = block.weight.mv(values[block.row]) / block.total[:, 0]
        return mean.view(*lead, -1)

    def pull(self, epsilon: float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `DenseKernel.pull`."""
        lead = self._lead(log_b, g)
        pull = self.x.new_empty(math.prod(lead), *self.x.shape[-2:])
        for block in self._blocks(epsilon, log_b, g, lead):
            weight, total = block.weight, block.total
            if block.distance is not None:  # unit vectors, and 0 where the points meet
                weight.div_(block.distance).masked_fill_(block.distance == 0, 0.0)
                towards = weight.sum(-1, keepdim=True) * block.x - weight @ block.y
                pull[block.row, block.points] = towards / total
            else:
                pull[block.row, block.points] = block.x - weight @ block.y / total
        return pull.view(*lead, *pull.shape[-2:])

    def _lead(self, log_b: Tensor, g: Tensor) -> torch.Size:
        return broadcast_shapes(
            self.x.shape[:-2], self.y.shape[:-2], log_b.shape[:-1], g.shape[:-1]
        )

    def _offset(self) -> Tensor | float:
        """Return the part of the soft minimum that the blocks leave out, (*, N)."""
        return 0.0 if self.p == 1 else 0.5 * self.x.square().sum(-1)

    def _blocks(
        self, epsilon: Tensor | float, log_b: Tensor, g: Tensor, lead: torch.Size
    ) -> Iterator[_Block]:
        """Walk through the kernel; rows of weights on common points share the costs of a block."""
        clouds = broadcast_shapes(self.x.shape[:-2], self.y.shape[:-2])
        xs, ys = (
            points.expand(*clouds, *points.shape[-2:])
            for points in (self._blocks_x, self._blocks_y)
        )
        height = (log_b + g / epsilon).expand(*lead, -1).reshape(-1, log_b.shape[-1])
        scale: Tensor | float = _LOG2_E / epsilon
        scales = scale.expand(*lead, 1).reshape(-1) if isinstance(scale, Tensor) else None
        size = _BLOCK if self.x.device.type == "cpu" else _BLOCK_OF_ACCELERATOR
        if self._dtype == torch.float32 and self.x.shape[-1] > _JOINED:
            size *= 2  # as many bytes: where the product is what takes time, that is faster
        count = max(size // max(self.y.shape[-2], 1), 1)
        for cloud, rows in _rows_of_clouds(lead, clouds):
            x, y = xs[cloud], ys[cloud]
            scale = scale if scales is None else scales[rows[0]]
            walk = self._walk_near if self.p == 1 else self._walk_half_square
            yield from walk(x, y, scale, _LOG2_E * height[rows], rows, count)

    def _walk_half_square(
        self, x: Tensor, y: Tensor, scale: Tensor | float, height: Tensor, rows: list[int],
        count: int,
    ) -> Iterator[_Block]:  # fmt: skip
        norms = 0.5 * scale * y.square().sum(-1, dtype=height.dtype)
        height = _finite((height - norms).to(y.dtype))
        alone = len(rows) == 1
        joined = alone and y.shape[-1] <= _JOINED
        right = torch.cat([y.T, height]) if joined else y.T
        buffers = x.new_empty(1 if alone else 2, count, y.shape[0])
        for start in range(0, x.shape[0], count):
            points = slice(start, min(start + count, x.shape[0]))
            left = scale * x[points]
            if joined:
                left = torch.nn.functional.pad(left, (0, 1), value=1.0)
            products = torch.mm(left, right, out=buffers[0, : points.stop - start])
            for row, high in zip(rows, height, strict=True):
                exponent = products
                if not joined:
                    exponent = torch.add(products, high, out=buffers[-1, : points.stop - start])
                yield _block(row, points, x, y, exponent, None)

    def _walk_near(
        self, x: Tensor, y: Tensor, scale: Tensor | float, height: Tensor, rows: list[int],
        count: int,
    ) -> Iterator[_Block]:  # fmt: skip
        height = _finite(height.to(y.dtype))
        buffers = x.new_empty(2, count, y.shape[0])
        for start in range(0, x.shape[0], count):
            points = slice(start, min(start + count, x.shape[0]))
            distance = self._distance(x[points], y, buffers[0, : points.stop - start], start)
            for row, high in zip(rows, height, strict=True):
                exponent = torch.mul(distance, -scale, out=buffers[1, : points.stop - start])
                yield _block(row, points, x, y, exponent.add_(high), distance)

    def _distance(self, x: Tensor, y: Tensor, out: Tensor, start: int) -> Tensor:
        if x.shape[-1] <= _DIFFERENCES:
            return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        torch.addmm(y.square().sum(-1), x, y.T, alpha=-2.0, out=out)
        out.add_(x.square().sum(-1, keepdim=True)).clamp_(min=0.0).sqrt_()
        if self.x is self.y:
            out.diagonal(start).zero_()
        return out


def _block(
    row: int, points: slice, x: Tensor, y: Tensor, exponent: Tensor, distance: Tensor | None
) -> _Block:
    largest = exponent.amax(-1, keepdim=True)
    weight = exponent.sub_(largest).exp2_()
    total = weight.sum(-1, keepdim=True)
    log2_sum = (largest + total.log2())[:, 0]
    return _Block(row, points, x[points], y, weight, total, log2_sum, distance)


def _finite(height: Tensor) -> Tensor:
    """Return a height at which an absent point stays absent, and 0 times it is no NaN."""
    return height.clamp(min=torch.finfo(height.dtype).min / 4)


def _rows_of_clouds(
    lead: torch.Size, clouds: torch.Size
) -> list[tuple[tuple[int, ...], list[int]]]:
    """Return each index of a pair of clouds with the flat rows of ``lead`` that use it."""
    skipped = len(lead) - len(clouds)
    rows: dict[tuple[int, ...], list[int]] = {}
    for flat, index in enumerate(itertools.product(*map(range, lead))):
        cloud = tuple(i if size > 1 else 0 for i, size in zip(index[skipped:], clouds, strict=True))
        rows.setdefault(cloud, []).append(flat)
    return list(rows.items())
