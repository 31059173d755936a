"""Blocks of the Gibbs kernel's exponents ``k_i + h_j - c(x_i, y_j) / eps``, as powers of two.

Processors raise two to a power faster than e. A block is one matrix product where it can be: for
p = 2 rows ``x_i / eps`` and columns ``y_j`` are joined by the heights, for p = 1 in many dimensions
by the points' squares, each with a one across from it, so that nothing is left to add. Distances
come from points that epsilon has scaled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from .costs import DIFFERENCES, inner_products, uses_onednn

# Bytes of a block, which the caches of most processors hold; more where a launch costs more than a
# pass: some microseconds, in which an accelerator goes through megabytes.
_BLOCK, _BLOCK_OF_ACCELERATOR = 2**20, 2**26
# Largest D at which points in float64 are copied to be joined by their heights.
_JOINED = 16


class Exponents:
    """The exponents between x (N, D) and y (M, D), under rows of heights on them.

    ``rows`` (R, N) and ``columns`` (R, M) are the heights k and h; ``scale`` is ``log2(e) / eps``;
    ``dtype`` is that of the blocks. ``whole`` says that they have all columns.
    """

    def __init__(
        self, x: Tensor, y: Tensor, p: int, scale: Tensor | float, rows: Tensor, columns: Tensor,
        dtype: torch.dtype, whole: bool,
    ) -> None:  # fmt: skip
        self.x, self.y = x, y
        self._p, self._scale, self._dtype = p, scale, dtype
        norms = [torch.linalg.vector_norm(points, dim=-1) for points in (x, y)]
        squares = [norm.square() for norm in norms]
        self._reach = torch.maximum(norms[0].amax(), norms[1].amax())
        if p == 2:  # the squares of |x - y|^2 belong to one side each
            rows, columns = rows - 0.5 * scale * squares[0], columns - 0.5 * scale * squares[1]
        self._rows, self._columns = _finite(rows.to(dtype)), _finite(columns.to(dtype))
        few, self._alone = x.shape[-1] <= DIFFERENCES, self._rows.shape[0] == 1
        # square of a distance that is as good as none
        self._least = torch.full_like(self._columns[0, 0], torch.finfo(dtype).tiny)
        # what a product is scaled by, and what of it belongs to the points of one side
        self._affine: tuple[Tensor | float, Tensor, Tensor] | None = None
        if p == 2 and self._alone:
            self._affine = scale, self._rows[0], self._columns[0]
        elif p == 1 and not few:
            ends = [(scale * scale * square).to(dtype) for square in squares]
            self._affine = -2.0 * scale * scale, *ends
            self._least = (8.0 * torch.finfo(dtype).eps * (scale * self._reach).square()).to(dtype)
        self._joined = self._affine is not None and (dtype != x.dtype or x.shape[-1] <= _JOINED)
        if self._affine is None and p == 1:
            self._y = (scale * y).to(dtype).T.contiguous()
        elif self._affine is not None and self._joined:
            self._y = _join(y, 1.0, (self._affine[2], 1.0), dtype)
            if whole:  # then oneDNN takes them as fast from columns, which `pull` needs
                self._y = self._y.T.contiguous().T
        else:
            self._y = y.to(dtype)
        size = _BLOCK if x.device.type == "cpu" else _BLOCK_OF_ACCELERATOR
        self.size = max(size // dtype.itemsize, y.shape[0])  # entries of a block
        self._buffers: dict[int, Tensor] = {}

    def walk(self, i: slice, j: slice) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield each row's exponents of the points i and j, and p = 1's scaled distances.

        All are in memory that the next call uses again.
        """
        if self._p == 2 and self._affine is not None:
            yield 0, self._product(i, j), None
            return
        distance = self._distance(i, j) if self._p == 1 else None
        common = self._product(i, j) if distance is None else distance
        for row, (high, wide) in enumerate(zip(self._rows, self._columns, strict=True)):
            out = self._buffer(1, common.shape)
            exponent = torch.add(wide[j], common, alpha=1 if distance is None else -1, out=out)
            yield row, exponent.add_(high[i, None]), distance

    def pull(
        self, i: slice, weight: Tensor, total: Tensor, distance: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return ``sum_j w_ij grad_x c(x_i, y_j) / total_i`` of points i, (n, D), and its error.

        The error, (n,) or (), is an estimate in units of a number's rounding. ``distance`` is
        p = 1's, of `walk`. The memory of the weights, and of the distances of one row, is used.
        """
        x, scale = self.x[i], self._scale
        if distance is None:  # it moves exponents, and with them what is a blur wide
            error = self._reach.square() * scale**0.5
            return x - self._of_points(weight).div_(total[:, None]), error
        # unit vectors, and 0 where the points meet
        weight.mul_(distance)
        square = distance.square_() if self._alone else distance.square()
        weight.div_(square.clamp_(min=self._least))
        inverse = weight.sum(-1, keepdim=True)
        pull = (inverse * x - self._of_points(weight)).mul_(scale / total[:, None])
        error = scale * self._reach * (1.0 + inverse[:, 0] / total)
        if self._affine is not None:  # a square's error is that of the reach's
            inverse = weight.mul_(square.rsqrt_()).sum(-1)
            error = error + (scale * self._reach).square() * inverse / total
        return pull, error

    def _of_points(self, weight: Tensor) -> Tensor:
        """Return ``sum_j w_ij y_j``."""
        if self._across.shape[0] > DIFFERENCES:
            return inner_products(weight, self._across)
        return torch.stack([weight.mv(y) for y in self._across], -1)

    @cached_property
    def _across(self) -> Tensor:
        """The points y coordinate by coordinate, (D, M), of which oneDNN wants each in a row."""
        if self._joined:
            return self._y.T[: self.y.shape[-1]]
        y = self.y.to(self._dtype).T
        return y if y.shape[0] > DIFFERENCES and self._dtype == self.y.dtype else y.contiguous()

    def _product(self, i: slice, j: slice) -> Tensor:
        """Return the products of the points' coordinates, with what either side adds."""
        if self._affine is None:
            x = (self._scale * self.x[i]).to(self._dtype)
        elif self._joined:
            scale, ends, _ = self._affine
            x = _join(self.x[i], scale, (1.0, ends[i]), self._dtype)
        else:
            scale, ends, columns = self._affine
            memory = self._buffer(0, (ends[i].shape[0], columns[j].shape[0]))
            product = torch.addmm(columns[j], scale * self.x[i], self._y[j].T, out=memory)
            return product.add_(ends[i, None])
        own = uses_onednn(x)
        out = None if own else self._buffer(0, (x.shape[0], self._y[j].shape[0]))
        return inner_products(x, self._y[j], out)

    def _distance(self, i: slice, j: slice) -> Tensor:
        """Return the scaled distances; from products, one that rounding buries may be below 0."""
        if self._affine is None:
            square = self._squares_of_differences((self._scale * self.x[i]).to(self._dtype), j)
        else:
            square = self._product(i, j)
        # a reciprocal root takes half of the time of a root
        inverse = torch.clamp(square, min=self._least, out=self._buffer(1, square.shape)).rsqrt_()
        distance = square.mul_(inverse)
        if self._affine is not None and self.x is self.y:
            distance.diagonal(i.start - j.start).zero_()
        return distance

    def _squares_of_differences(self, x: Tensor, j: slice) -> Tensor:
        y = self._y[:, j]
        square, apart = (self._buffer(k, (x.shape[0], y.shape[1])) for k in (0, 1))
        torch.sub(x[:, 0, None], y[0], out=square).square_()
        for k in range(1, x.shape[1]):
            torch.sub(x[:, k, None], y[k], out=apart)
            square.addcmul_(apart, apart)
        return square

    def _buffer(self, which: int, shape: Sequence[int]) -> Tensor:
        if which not in self._buffers:
            self._buffers[which] = self._y.new_empty(self.size)
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
