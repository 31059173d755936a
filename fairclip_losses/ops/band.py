"""The Gibbs kernel on a line near the monotone coupling: what a small blur leaves of it.

At a small blur the plan of an entropic problem keeps close to the optimal coupling, which on a line
matches equal quantiles. Each point then needs only the points around its own quantile on the other
side. The solver tests that the band was wide enough on the whole kernel, and widens it if not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import broadcast_shapes
from .exact import along

# Entries of a block of costs, as in the streamed kernel.
_BLOCK = 2**18


class BandKernel:
    """The kernel between x (*, N, 1) and y (*, M, 1) in a window of ``width`` points of y.

    a (*, N) and b (*, M) are the weights whose quantiles the windows follow.
    """

    def __init__(self, x: Tensor, y: Tensor, p: int, a: Tensor, b: Tensor, width: int) -> None:
        self.x, self.y, self.p, self.a, self.b = x, y, p, a, b
        self.width = min(width, y.shape[-2])
        # absent points last: they would fill windows
        present = torch.where(b > 0, y[..., 0], torch.inf)
        self._order = present.argsort(dim=-1, stable=True)
        self._sorted_y = along(y[..., 0], self._order)
        x_order = x[..., 0].argsort(dim=-1)
        mass = along(a, x_order)
        middle = mass.cumsum(-1) - 0.5 * mass
        levels = along(b, self._order).cumsum(-1)
        lead = broadcast_shapes(middle.shape[:-1], levels.shape[:-1])
        middle = middle.expand(*lead, -1).contiguous()
        partner = torch.searchsorted(levels.expand(*lead, -1).contiguous(), middle)
        start = (partner - self.width // 2).clamp(0, y.shape[-2] - self.width)
        place = x_order.expand(start.shape)
        self._start = torch.empty_like(start).scatter_(-1, place, start)  # (*, N)
        self._other: BandKernel | None = None

    @property
    def transposed(self) -> BandKernel:
        """The kernel from y to x, in its own windows."""
        if self._other is None:
            self._other = BandKernel(self.y, self.x, self.p, self.b, self.a, self.width)
            self._other._other = self
        return self._other

    def softmin(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `DenseKernel.softmin`."""
        blocks = self._blocks(epsilon, log_b + g / epsilon)
        return torch.cat([exponent.logsumexp(-1) for exponent, _ in blocks], -1).mul(-epsilon)

    def average(self, epsilon: float, log_b: Tensor, g: Tensor, values: Tensor) -> Tensor:
        """See `DenseKernel.average`."""
        ordered = along(values, self._order)
        blocks = self._blocks(epsilon, log_b + g / epsilon)
        return torch.cat(
            [
                (exponent.softmax(-1) * _read(ordered, places)).sum(-1)
                for exponent, places in blocks
            ],
            -1,
        )

    def _blocks(self, epsilon: Tensor | float, exponent: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        exponent = along(exponent, self._order)
        window = torch.arange(self.width, device=self.x.device)
        size = max(_BLOCK // (self.width * max(math.prod(self._start.shape[:-1]), 1)), 1)
        for start, x in zip(
            torch.split(self._start, size, -1), torch.split(self.x, size, -2), strict=True
        ):
            places = start[..., None] + window
            distance = (x - _read(self._sorted_y, places)).abs()
            cost = distance if self.p == 1 else 0.5 * distance.square()
            yield _read(exponent, places) - cost / epsilon, places


def _read(values: Tensor, places: Tensor) -> Tensor:
    """Read ``values`` (*, M) at ``places`` (*, N, W), leading dims broadcast."""
    return along(values, places.flatten(-2)).view(*places.shape)
