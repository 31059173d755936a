"""The Gibbs kernel a block of rows at a time: any dimension, never all costs in memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import broadcast_shapes
from .dense import DenseKernel

# Entries of a block of costs: 2 MiB of float64, which the caches of most processors hold.
_BLOCK = 2**18


class StreamedKernel:
    """As `DenseKernel`, with temporaries of a fixed size."""

    def __init__(self, x: Tensor, y: Tensor, p: int) -> None:
        self.x, self.y, self.p = x, y, p

    @property
    def transposed(self) -> StreamedKernel:
        """The kernel from y to x."""
        return StreamedKernel(self.y, self.x, self.p)

    def softmin(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `DenseKernel.softmin`."""
        return self._by_blocks(lambda kernel: kernel.softmin(epsilon, log_b, g), log_b, g, -1)

    def average(self, epsilon: float, log_b: Tensor, g: Tensor, values: Tensor) -> Tensor:
        """See `DenseKernel.average`."""
        return self._by_blocks(
            lambda kernel: kernel.average(epsilon, log_b, g, values), log_b, g, -1
        )

    def pull(self, epsilon: float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `DenseKernel.pull`."""
        return self._by_blocks(lambda kernel: kernel.pull(epsilon, log_b, g), log_b, g, -2)

    def _by_blocks(
        self, read: Callable[[DenseKernel], Tensor], log_b: Tensor, g: Tensor, dim: int
    ) -> Tensor:
        lead = broadcast_shapes(
            self.x.shape[:-2], self.y.shape[:-2], log_b.shape[:-1], g.shape[:-1]
        )
        row = max(math.prod(lead) * self.y.shape[-2], 1)
        blocks = torch.split(self.x, max(_BLOCK // row, 1), -2)
        return torch.cat([read(DenseKernel(block, self.y, self.p)) for block in blocks], dim)
