"""Blocks of the Gibbs kernel's exponents ``k_i + h_j - c(x_i, y_j) / eps``, as powers of two.

Processors raise two to a power faster than e. For p = 2 a block is one matrix product: its rows
``x_i / eps`` and columns ``y_j`` are joined by the heights, each with a one across from it, so that
nothing is left to add.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .costs import DIFFERENCES, inner_products, squares_of_differences, uses_onednn

# Bytes of a block, which the caches of most processors hold; more where a launch costs more than a
# pass: some microseconds, in which an accelerator goes through megabytes.
_BLOCK, _BLOCK_OF_ACCELERATOR = 2**20, 2**26
# Largest D at which points in float64 are copied to be joined by their heights.
_JOINED = 16


class Exponents:
    """The exponents between x (N, D) and y (M, D), under rows of heights on them.

    ``rows`` (R, N) and ``columns`` (R, M) are the heights k and h; ``scale`` is ``log2(e) / eps``;
    ``dtype`` is that of the blocks.
    """

    def __init__(
        self, x: Tensor, y: Tensor, p: int, scale: Tensor | float, rows: Tensor, columns: Tensor,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.x, self.y = x, y
        self._p, self._scale = p, scale
        if p == 2:  # the squares of |x - y|^2 belong to one side each
            rows = rows - 0.5 * scale * torch.linalg.vector_norm(x, dim=-1).square()
            columns = columns - 0.5 * scale * torch.linalg.vector_norm(y, dim=-1).square()
        self._rows, self._columns = _finite(rows.to(dtype)), _finite(columns.to(dtype))
        alone = self._rows.shape[0] == 1
        self._joined = p == 2 and alone and (dtype != x.dtype or x.shape[-1] <= _JOINED)
        self._x = x if dtype == x.dtype or self._joined else x.to(dtype)
        if self._joined:
            self._y = _join(y, 1.0, (self._columns[0], 1.0), dtype)
        else:
            self._y = self._x if x is y else y.to(dtype)
        size = _BLOCK if x.device.type == "cpu" else _BLOCK_OF_ACCELERATOR
        self.size = max(size // dtype.itemsize, y.shape[0])  # entries of a block
        self._buffers: list[Tensor] = []

    def walk(self, i: slice, j: slice) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield each row's exponents of the points i and j, and p = 1's distances.

        All are in memory that the next call uses again.
        """
        y = self._y[j]
        if self._joined:
            x = _join(self.x[i], self._scale, (1.0, self._rows[0, i]), y.dtype)
        else:
            x = self._x[i]
        shape = (x.shape[0], y.shape[0])
        if self._joined:
            yield 0, self._products(x, y), None
            return
        distance = None
        if self._p == 1:
            common = distance = self._distance(x, y, i.start - j.start)
        elif self._rows.shape[0] == 1:
            exponent = torch.addmm(
                self._columns[0, j], self._scale * x, y.T, out=self._buffer(0, shape)
            )
            yield 0, exponent.add_(self._rows[0, i, None]), None
            return
        else:
            common = self._products(self._scale * x, y)
        for row, (high, wide) in enumerate(zip(self._rows, self._columns, strict=True)):
            exponent = self._buffer(1, shape)
            if distance is None:
                torch.add(common, wide[j], out=exponent)
            else:
                torch.mul(common, -self._scale, out=exponent).add_(wide[j])
            yield row, exponent.add_(high[i, None]), distance

    def _products(self, x: Tensor, y: Tensor) -> Tensor:
        out = None if uses_onednn(x) else self._buffer(0, (x.shape[0], y.shape[0]))
        return inner_products(x, y, out)

    def _distance(self, x: Tensor, y: Tensor, ahead: int) -> Tensor:
        if x.shape[-1] <= DIFFERENCES:
            return squares_of_differences(x, y).sqrt_()
        square = self._products(x, y).mul_(-2.0)
        square.add_(y.square().sum(-1)).add_(x.square().sum(-1, keepdim=True))
        distance = square.clamp_(min=0.0).sqrt_()
        if self.x is self.y:
            distance.diagonal(ahead).zero_()
        return distance

    def _buffer(self, which: int, shape: Sequence[int]) -> Tensor:
        while len(self._buffers) <= which:
            self._buffers.append(self._y.new_empty(self.size))
        return self._buffers[which][: math.prod(shape)].view(shape)


def _join(
    points: Tensor, scale: Tensor | float, heights: tuple[Tensor | float, Tensor | float],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the points times ``scale`` with two heights as last coordinates, (N, D + 2)."""
    joined = points.new_empty(points.shape[0], points.shape[1] + 2, dtype=dtype)
    joined[:, :-2].copy_(points).mul_(scale)
    joined[:, -2], joined[:, -1] = heights
    return joined


def _finite(height: Tensor) -> Tensor:
    """Return a height at which an absent point stays absent, and 0 times it is no NaN."""
    return height.clamp(min=torch.finfo(height.dtype).min / 8)


def rows_of_clouds(lead: torch.Size, clouds: torch.Size) -> list[tuple[tuple[int, ...], list[int]]]:
    """Return each index of a pair of clouds with the flat rows of ``lead`` that use it."""
    skipped = len(lead) - len(clouds)
    rows: dict[tuple[int, ...], list[int]] = {}
    for flat, index in enumerate(itertools.product(*map(range, lead))):
        cloud = tuple(i if size > 1 else 0 for i, size in zip(index[skipped:], clouds, strict=True))
        rows.setdefault(cloud, []).append(flat)
    return list(rows.items())
