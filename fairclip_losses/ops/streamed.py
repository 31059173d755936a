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

from ..validation import broadcast_shapes
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
    log_factor: Tensor  # (n,)
    distance: Tensor | None  # (n, M), over eps, for p = 1
    x: Tensor  # (n, D)
    y: Tensor  # (M, D)

    @property
    def log_sum(self) -> Tensor:
        """``log sum_j b_j exp((g_j - C_ij) / eps)``, (n,)."""
        return self.total.log().add_(self.log_factor)


class StreamedKernel(Kernel):
    """See `Kernel`; nothing of size N x M is held. Tiles have the points' dtype."""

    def __init__(self, x: Tensor, y: Tensor, p: int) -> None:
        self.x, self.y, self.p = x, y, p

    def in_float32(self, epsilon: float) -> tuple[StreamedKernel, float] | None:
        """Return the kernel in float32, twice as fast, and the marginal error it can get to.

        It is for iterations that only lead towards the solution; None where its exponents would be
        off by more than `_MAX_EXPONENT_ERROR`. The reach of the points is read back.
        """
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
        size = max(entries // m, 1)
        heights = (log_b + g / epsilon).to(self.x.dtype).expand(*lead, m)
        # of absent points: -inf times 0 would be NaN
        heights = heights.clamp(min=torch.finfo(heights.dtype).min / 8)
        xs, ys = (points.expand(*lead, *points.shape[-2:]) for points in (self.x, self.y))
        for index in itertools.product(*map(range, lead)):
            x = xs[index]
            y = x if self.y is self.x else ys[index]
            exponents = _Exponents(x, y, self.p, epsilon, heights[index], size)
            for start in range(0, n, size):
                points = slice(start, min(start + size, n))
                weight, distance = exponents.tile(points)
                largest = weight.amax(-1)
                weight.sub_(largest[:, None]).exp_()
                log_factor = largest if exponents.row is None else largest + exponents.row[points]
                yield _Tile(
                    (*index, points), start, weight, weight.sum(-1), log_factor, distance,
                    x[points], y,
                )  # fmt: skip


class _Exponents:
    """The exponents ``h_j - C_ij / eps`` between x (N, D) and y (M, D), ``size`` rows at a time."""

    def __init__(
        self, x: Tensor, y: Tensor, p: int, epsilon: Tensor | float, height: Tensor, size: int
    ) -> None:
        self._height, self._common, self._p = height, x is y, p
        self.row: Tensor | None = None  # (N,) what of the exponents `tile` leaves out
        ones, transposed = torch.ones_like(x[:, :1]), y.T / epsilon
        if p == 2:  # x_i . y_j / eps + (h_j - |y_j|^2 / 2 eps), and a number of each row
            self.row = x.square().sum(-1) * (-0.5 / epsilon)
            column = height - y.square().sum(-1) * (0.5 / epsilon)
            self._x = torch.cat([x, ones], -1)
            self._y = torch.cat([transposed, column[None]])
        else:  # |x_i|^2 - 2 x_i . y_j + |y_j|^2, over eps^2
            x = x / epsilon
            square = x.square().sum(-1, keepdim=True)
            self._x = torch.cat([-2.0 * x, square, ones], -1)
            column = transposed.square().sum(0, keepdim=True)
            self._y = torch.cat([transposed, torch.ones_like(column), column])
            # below this a squared distance is rounding
            rounding = torch.finfo(x.dtype)
            self._least = (8.0 * rounding.eps * square.amax()).clamp(min=rounding.tiny)
        self._buffers = x.new_empty(3 - p, min(size, len(x)), len(y))

    def tile(self, points: slice) -> tuple[Tensor, Tensor | None]:
        """Return the exponents (n, M) of these points and, for p = 1, the distances over eps.

        Both are in memory that the next call uses again.
        """
        memory = self._buffers[:, : points.stop - points.start]
        product = torch.mm(self._x[points], self._y, out=memory[0])
        if self._p == 2:
            return product, None
        distance = product.clamp_(min=self._least).sqrt_()
        if self._common:
            distance.diagonal(points.start).zero_()
        return torch.sub(self._height, distance, out=memory[1]), distance
