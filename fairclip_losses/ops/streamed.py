"""The Gibbs kernel a tile of rows at a time: any dimension, O(N) memory.

A tile costs one matrix product, one exponential and a few passes over numbers that the cache still
holds. For p = 2 the product gives the exponents themselves: the columns' heights are one more
coordinate of their points, with a one across from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..validation import broadcast_shapes, is_readable
from .options import Kernel

# Entries of a tile: 1 MiB in float64, so that a tile and its distances fit into a cache of 2 MiB;
# more on accelerators, where a launch takes as long as a pass over megabytes.
_TILE_ENTRIES, _TILE_ENTRIES_OF_ACCELERATOR = 2**17, 2**23
# Error of an exponent up to which float32 leads towards the solution, and the marginal error where
# its rounding stops that at the best.
_MAX_EXPONENT_ERROR, _FLOAT32_TOL = 1e-3, 1e-5


class _Tile(NamedTuple):
    """Some rows of the kernel under one row of weights."""

    rows: tuple[int | slice, ...]  # the row of weights and the points of x, an index of (*, N)
    start: int  # the first of these points
    weight: Tensor  # (n, M), exp((g_j - C_ij) / eps + log b_j) by a factor of each row
    total: Tensor  # (n,), its sum over j
    log_sum: Tensor  # (n,) log sum_j b_j exp((g_j - C_ij) / eps)
    distance: Tensor | None  # (n, M), over eps, for p = 1
    x: Tensor  # (n, D)
    y: Tensor  # (M, D)


class StreamedKernel(Kernel):
    """See `Kernel`; nothing of size N x M is held. Tiles have the points' dtype."""

    def __init__(self, x: Tensor, y: Tensor, p: int) -> None:
        self.x, self.y, self.p = x, y, p

    def lead_in(self, epsilon: float) -> tuple[StreamedKernel, float] | None:
        """Return the kernel in float32, twice as fast, unless its exponents have no digits left."""
        if not is_readable(self.x):
            return None
        reach = max(float(points.square().sum(-1).max()) for points in (self.x, self.y)) ** 0.5
        error = 2.0 * reach**self.p / epsilon * torch.finfo(torch.float32).eps
        if error > _MAX_EXPONENT_ERROR:
            return None
        x = self.x.float()
        y = x if self.y is self.x else self.y.float()
        return StreamedKernel(x, y, self.p), max(_FLOAT32_TOL, error)

    @property
    def transposed(self) -> StreamedKernel:
        """The kernel from y to x."""
        return StreamedKernel(self.y, self.x, self.p)

    def softmin(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `Kernel.softmin`."""
        lead = self._lead(log_b, g)
        log_sum = g.new_empty(*lead, self.x.shape[-2])
        for tile in self._tiles(epsilon, log_b, g, lead):
            log_sum[tile.rows] = tile.log_sum
        return -epsilon * log_sum

    def update(
        self, epsilon: Tensor | float, log_a: Tensor, log_b: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel.update`: one pass, as a tile of rows gives its part of the columns' sums."""
        lead = broadcast_shapes(self._lead(log_b, g), log_a.shape[:-1])
        a = log_a.exp().expand(*lead, -1)
        log_sum, columns = g.new_empty(a.shape), self.x.new_zeros(*lead, g.shape[-1])
        for tile in self._tiles(epsilon, log_b, g, lead):
            log_sum[tile.rows] = tile.log_sum
            share = a[tile.rows].to(tile.total.dtype) / tile.total
            columns[tile.rows[:-1]].addmv_(tile.weight.T, share)
        # A sum that underflows raises the potential by some 700 epsilon at most.
        log_columns = columns.clamp_(min=torch.finfo(columns.dtype).tiny).log_()
        g_next = torch.where(log_b > -torch.inf, g - epsilon * (log_columns - log_b), g)
        return -epsilon * log_sum, g_next

    def gradient(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `Kernel.gradient`."""
        lead = self._lead(log_b, g)
        found = g.new_empty(*lead, *self.x.shape[-2:])
        for tile in self._tiles(epsilon, log_b, g, lead):
            weight, scale, shares = tile.weight, tile.total, tile.total
            if tile.distance is not None:  # unit vectors, and 0 where the points meet
                weight.div_(tile.distance)
                if self.x is self.y:
                    weight.diagonal(tile.start).zero_()
                scale, shares = epsilon * tile.total, weight.sum(-1)
            towards = shares[:, None] * tile.x - weight @ tile.y
            found[tile.rows] = towards.div_(scale[:, None])
        return found

    def _lead(self, log_b: Tensor, g: Tensor) -> torch.Size:
        return broadcast_shapes(
            self.x.shape[:-2], self.y.shape[:-2], log_b.shape[:-1], g.shape[:-1]
        )

    def _tiles(
        self, epsilon: Tensor | float, log_b: Tensor, g: Tensor, lead: torch.Size
    ) -> Iterator[_Tile]:
        """Yield the kernel of each row of weights, tile by tile."""
        n, m = self.x.shape[-2], self.y.shape[-2]
        entries = _TILE_ENTRIES if self.x.device.type == "cpu" else _TILE_ENTRIES_OF_ACCELERATOR
        size = min(max(entries // m, 1), n)
        heights = (log_b + g / epsilon).to(self.x.dtype).expand(*lead, m)
        # of absent points: -inf times 0 would be NaN
        heights = heights.clamp(min=torch.finfo(heights.dtype).min / 8)
        xs, ys = (points.expand(*lead, *points.shape[-2:]) for points in (self.x, self.y))
        memory, distance = self.x.new_empty(3 - self.p, size, m), None  # used again by each tile
        for index in itertools.product(*map(range, lead)):
            x = xs[index]
            y = x if self.y is self.x else ys[index]
            left, right, row, least = self._factors(x, y, epsilon, heights[index])
            for start in range(0, n, size):
                points = slice(start, min(start + size, n))
                buffers = memory[:, : points.stop - start]
                weight = torch.mm(left[points], right, out=buffers[0])
                if self.p == 1:
                    distance = weight.clamp_(min=least).sqrt_()
                    if y is x:
                        distance.diagonal(start).zero_()
                    weight = torch.sub(heights[index], distance, out=buffers[1])
                largest = weight.amax(-1)
                weight.sub_(largest[:, None]).exp_()
                total = weight.sum(-1)
                log_sum = total.log().add_(largest.add_(row[points]))  # the large ones first
                yield _Tile((*index, points), start, weight, total, log_sum, distance, x[points], y)

    def _factors(
        self, x: Tensor, y: Tensor, epsilon: Tensor | float, height: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return factors (N, K) and (K, M) for x (N, D) and y (M, D), and what is left to do.

        For p = 2 their product are the exponents ``h_j - C_ij / eps`` less a number of each row,
        (N,); for p = 1 the squared distances over eps^2, rounding below the last number.
        """
        transposed, x = y.T / epsilon, x if self.p == 2 else x / epsilon
        square = x.square().sum(-1, keepdim=True)
        if self.p == 2:  # x_i . y_j / eps + (h_j - |y_j|^2 / 2 eps)
            column = height - y.square().sum(-1) * (0.5 / epsilon)
            left = torch.cat([x, torch.ones_like(square)], -1)
            right = torch.cat([transposed, column[None]])
            return left, right, square[:, 0] * (-0.5 / epsilon), square
        # |x_i|^2 - 2 x_i . y_j + |y_j|^2
        left = torch.cat([-2.0 * x, square, torch.ones_like(square)], -1)
        column = transposed.square().sum(0, keepdim=True)
        right = torch.cat([transposed, torch.ones_like(column), column])
        rounding = torch.finfo(x.dtype)
        least = (8.0 * rounding.eps * square.amax()).clamp(min=rounding.tiny)
        return left, right, torch.zeros_like(square[:, 0]), least
