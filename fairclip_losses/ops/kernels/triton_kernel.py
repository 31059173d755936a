"""The Gibbs kernel as one fused kernel of the GPU: soft minimum and pull, nothing in between.

A program takes some rows and one row of weights, walks through the columns with a running maximum
and a running sum, and keeps its part of the pull beside them. Costs are taken from differences of
coordinates, so points near each other lose no digits, and no N x M number is ever written.

Importing this module needs Triton; ``TRITON_INTERPRET=1``, set before, runs it on the CPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import broadcast_shapes

# Rows and columns of a tile, in programs with and without a pull, and coordinates of one's pull.
_ROWS, _COLUMNS = 16, 128
_ROWS_PULL, _COLUMNS_PULL, _COORDINATES = 16, 32, 16
_LOG2_E, _LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2.0))


@triton.jit  # type: ignore[untyped-decorator]
def _reduce(  # type: ignore[no-untyped-def]
    x, y, cloud_x, cloud_y, height, epsilon, absent, softmin, pull, n, m, dimension,
    P: tl.constexpr, PULL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    COORDINATES: tl.constexpr,
):  # fmt: skip
    """Reduce over j: x (K, D, n), y (L, D, m), height (R, m), epsilon (R,); programs (n / ROWS, R).

    ``softmin`` (R, n) and, with PULL, ``pull`` (R, n, D) are written; the third axis of programs
    then goes over the coordinates.
    """
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(2) * COORDINATES + tl.arange(0, COORDINATES)
    x += tl.load(cloud_x + row) * dimension * n
    y += tl.load(cloud_y + row) * dimension * m
    eps = tl.load(epsilon + row)
    floor = tl.load(absent)
    scale = _LOG2_E / eps
    largest = tl.full([ROWS], float("-inf"), x.dtype.element_ty)
    total = tl.zeros([ROWS], x.dtype.element_ty)
    if PULL:
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
        if PULL:
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
    if PULL:
        tl.store(
            pull + (row * n + i[:, None]) * dimension + d[None, :], towards / total[:, None],
            mask=(d < dimension)[None, :] & (i < n)[:, None],
        )  # fmt: skip


class TritonKernel:
    """As `DenseKernel`, fused: one launch a soft minimum, no temporary."""

    rounding, unit, spare = 0.0, 0.0, 1.0  # costs are those of differences

    def __init__(self, x: Tensor, y: Tensor, p: int) -> None:
        self.x, self.y, self.p = x, y, p
        # coordinates in the second to last place: neighbouring points lie side by side in memory
        self._x, self._y = (
            points.reshape(-1, *points.shape[-2:]).transpose(-1, -2).contiguous()
            for points in (x, y)
        )
        self._absent = x.new_full((1,), torch.finfo(x.dtype).min / 4)
        self._other: TritonKernel | None = None

    @property
    def transposed(self) -> TritonKernel:
        """The kernel from y to x."""
        if self._other is None:
            other = object.__new__(TritonKernel)
            other.x, other.y, other.p = self.y, self.x, self.p
            other._x, other._y, other._absent = self._y, self._x, self._absent
            self._other, other._other = other, self
        return self._other

    def softmin(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `DenseKernel.softmin`."""
        return self._launch(epsilon, log_b, g, with_pull=False)[0]

    def sweep(
        self, epsilon: Tensor | float, log_a: Tensor, log_b: Tensor, g: Tensor,
        near: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `DenseKernel.sweep`."""
        f = self.softmin(epsilon, log_b, g)
        return f, self.transposed.softmin(epsilon, log_a, f)

    def average(self, epsilon: float, log_b: Tensor, g: Tensor, values: Tensor) -> Tensor:
        """See `DenseKernel.average`."""
        low = values.amin(-1, keepdim=True)
        weighted = self.softmin(epsilon, log_b + (values - low).log(), g)
        return low + ((self.softmin(epsilon, log_b, g) - weighted) / epsilon).exp()

    def pull(self, epsilon: float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `DenseKernel.pull`."""
        return self._launch(epsilon, log_b, g, with_pull=True)[1]

    def _launch(
        self, epsilon: Tensor | float, log_b: Tensor, g: Tensor, with_pull: bool
    ) -> tuple[Tensor, Tensor]:
        x, y = self.x, self.y
        lead = broadcast_shapes(x.shape[:-2], y.shape[:-2], log_b.shape[:-1], g.shape[:-1])
        rows, n, m, dimension = math.prod(lead), x.shape[-2], y.shape[-2], x.shape[-1]
        if isinstance(epsilon, Tensor):
            height, epsilons = log_b + g / epsilon, epsilon.expand(*lead, 1).contiguous()
        else:
            height = torch.add(log_b, g, alpha=1.0 / epsilon)
            epsilons = x.new_full((rows,), epsilon)
        softmin = x.new_empty(*lead, n)
        pull = x.new_empty(*lead, n, dimension) if with_pull else softmin
        tile = (_ROWS_PULL, _COLUMNS_PULL) if with_pull else (_ROWS, _COLUMNS)
        groups = triton.cdiv(dimension, _COORDINATES) if with_pull else 1
        grid = (triton.cdiv(n, tile[0]), rows, groups)
        with torch.cuda.device(x.device if x.is_cuda else -1):  # where Triton launches
            _reduce[grid](
                self._x, self._y, _cloud_of_row(x, lead), _cloud_of_row(y, lead),
                height.expand(*lead, m).contiguous(), epsilons, self._absent, softmin, pull,
                n, m, dimension, P=self.p, PULL=with_pull, ROWS=tile[0], COLUMNS=tile[1],
                COORDINATES=_COORDINATES,
            )  # fmt: skip
        return softmin, pull


def _cloud_of_row(points: Tensor, lead: torch.Size) -> Tensor:
    """Return which of the flattened clouds each flattened row of weights lies on, (R,)."""
    count = math.prod(points.shape[:-2])
    clouds = torch.arange(count, device=points.device).view(points.shape[:-2])
    return clouds.expand(lead).reshape(-1).contiguous()  # stride 0 else
