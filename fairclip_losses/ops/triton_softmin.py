"""The Gibbs kernel as one fused kernel of the GPU: softmin and gradient, nothing in between.

A program takes some rows of points and one row of weights, goes through the columns with a running
maximum and a running sum, and keeps its part of the gradient beside them. Costs are taken from
differences of coordinates, so points near each other lose no digits, and no N x M number is ever
written.

Importing this module needs Triton; ``TRITON_INTERPRET=1``, set before, runs it on the CPU.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..validation import broadcast_shapes
from .options import Kernel

# Rows and columns of a tile, of programs without and with a gradient, and coordinates of one's
# gradient: rows x columns x coordinates must stay in registers.
_ROWS, _COLUMNS, _COLUMNS_OF_GRADIENT, _COORDINATES = 16, 128, 32, 16
_LOG2_E, _LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2.0))


@triton.jit  # type: ignore[untyped-decorator]
def _reduce(  # type: ignore[no-untyped-def]
    x, y, cloud_x, cloud_y, height, epsilon, absent, softmin, gradient, n, m, dimension,
    P: tl.constexpr, GRADIENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    COORDINATES: tl.constexpr,
):  # fmt: skip
    """Reduce over j: x (K, D, n), y (L, D, m), height (R, m), epsilon (); programs (n / ROWS, R).

    ``softmin`` (R, n) and, with GRADIENT, ``gradient`` (R, n, D) are written; the third axis of
    programs then goes over the coordinates.
    """
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(2) * COORDINATES + tl.arange(0, COORDINATES)
    x += tl.load(cloud_x + row) * dimension * n
    y += tl.load(cloud_y + row) * dimension * m
    eps = tl.load(epsilon)
    floor = tl.load(absent)
    scale = _LOG2_E / eps
    largest = tl.full([ROWS], float("-inf"), x.dtype.element_ty)
    total = tl.zeros([ROWS], x.dtype.element_ty)
    if GRADIENT:
        towards = tl.zeros([ROWS, COORDINATES], x.dtype.element_ty)
        x_d = tl.load(
            x + d[None, :] * n + i[:, None],
            mask=(d < dimension)[None, :] & (i < n)[:, None], other=0.0,
        )  # fmt: skip
    for start in range(0, m, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        square = tl.zeros([ROWS, COLUMNS], x.dtype.element_ty)
        for k in range(0, dimension):
            x_k = tl.load(x + k * n + i, mask=i < n, other=0.0)
            y_k = tl.load(y + k * m + j, mask=j < m, other=0.0)
            apart = x_k[:, None] - y_k[None, :]
            square += apart * apart
        h = tl.load(height + row * m + j, mask=j < m, other=float("-inf"))
        h = tl.maximum(h * _LOG2_E, floor)
        cost = tl.sqrt(square) if P == 1 else 0.5 * square
        exponent = h[None, :] - cost * scale
        top = tl.maximum(largest, tl.max(exponent, 1))
        fade = tl.exp2(largest - top)
        weight = tl.exp2(exponent - top[:, None])
        weight = tl.where((j < m)[None, :], weight, 0.0)
        total = total * fade + tl.sum(weight, 1)
        if GRADIENT:
            if P == 1:  # unit vectors, and 0 where the points meet
                weight = tl.where(cost > 0, weight / tl.where(cost > 0, cost, 1.0), 0.0)
            y_d = tl.load(
                y + d[None, :] * m + j[:, None],
                mask=(d < dimension)[None, :] & (j < m)[:, None], other=0.0,
            )  # fmt: skip
            apart_d = x_d[:, None, :] - y_d[None, :, :]
            towards = towards * fade[:, None] + tl.sum(weight[:, :, None] * apart_d, 1)
        largest = top
    value = -eps * _LN_2 * (largest + tl.log2(total))
    tl.store(softmin + row * n + i, value, mask=(i < n) & (tl.program_id(2) == 0))
    if GRADIENT:
        tl.store(
            gradient + (row * n + i[:, None]) * dimension + d[None, :], towards / total[:, None],
            mask=(d < dimension)[None, :] & (i < n)[:, None],
        )  # fmt: skip


class TritonKernel(Kernel):
    """See `Kernel`; one launch a softmin, no temporary."""

    def __init__(self, x: Tensor, y: Tensor, p: int) -> None:
        self.x, self.y, self.p = x, y, p
        # coordinates in the second to last place: neighbouring points lie side by side in memory
        self._x, self._y = (
            points.reshape(-1, *points.shape[-2:]).transpose(-1, -2).contiguous()
            for points in (x, y)
        )
        self._absent = x.new_full((1,), torch.finfo(x.dtype).min / 4)

    @cached_property
    def transposed(self) -> TritonKernel:
        """The kernel from y to x."""
        other = TritonKernel(self.y, self.x, self.p)
        other.transposed = self
        return other

    def softmin(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `Kernel.softmin`."""
        return self._launch(epsilon, log_b, g, with_gradient=False)[0]

    def gradient(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `Kernel.gradient`."""
        return self._launch(epsilon, log_b, g, with_gradient=True)[1]

    def _launch(
        self, epsilon: Tensor | float, log_b: Tensor, g: Tensor, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        x, y = self.x, self.y
        lead = broadcast_shapes(x.shape[:-2], y.shape[:-2], log_b.shape[:-1], g.shape[:-1])
        rows, n, m, dimension = math.prod(lead), x.shape[-2], y.shape[-2], x.shape[-1]
        height = (log_b + g / epsilon).expand(*lead, m).contiguous()
        softmin = x.new_empty(*lead, n)
        gradient = x.new_empty(*lead, n, dimension) if with_gradient else softmin
        columns = _COLUMNS_OF_GRADIENT if with_gradient else _COLUMNS
        groups = triton.cdiv(dimension, _COORDINATES) if with_gradient else 1
        grid = (triton.cdiv(n, _ROWS), rows, groups)
        with torch.cuda.device(x.device if x.is_cuda else -1):  # where Triton launches
            _reduce[grid](
                self._x, self._y, _cloud_of_row(x, lead), _cloud_of_row(y, lead), height,
                torch.as_tensor(epsilon, dtype=x.dtype, device=x.device), self._absent, softmin,
                gradient, n, m, dimension, P=self.p, GRADIENT=with_gradient, ROWS=_ROWS,
                COLUMNS=columns, COORDINATES=_COORDINATES,
            )  # fmt: skip
        return softmin, gradient


def _cloud_of_row(points: Tensor, lead: torch.Size) -> Tensor:
    """Return which of the flattened clouds each flattened row of weights lies on, (R,)."""
    count = math.prod(points.shape[:-2])
    clouds = torch.arange(count, device=points.device).view(points.shape[:-2])
    return clouds.expand(lead).reshape(-1).contiguous()  # stride 0 else
