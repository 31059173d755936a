"""A batch that is spread over processes, brought together by the conventions of open_clip's losses.

Each process holds b pairs of a global batch of W b, rank by rank. The processes' gradients are
averaged afterwards (by DistributedDataParallel), which decides how a term must be scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """The processes that a loss is spread over, and this one's place among them."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def of(cls, loss: Any) -> Processes:
        """Read them off a loss as open_clip's losses hold them; other losses run in one process."""
        return cls(int(getattr(loss, "rank", 0)), int(getattr(loss, "world_size", 1)))

    def own(self, local_size: int) -> slice:
        """Return the place of this process's pairs in the global batch."""
        return slice(self.rank * local_size, (self.rank + 1) * local_size)

    def gather(self, values: Tensor) -> Tensor:
        """Return the values of all processes, (W b, ...) from (b, ...), without gradients."""
        if self.world_size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, values.detach().contiguous())
        return torch.cat(parts)

    def gather_with_gradient(self, values: Tensor) -> Tensor:
        """Return the values of all processes; what they do there comes back as gradient here."""
        gathered: Tensor = _GatherWithGradient.apply(values, self)
        return gathered

    def gather_live(self, values: Tensor) -> Tensor:
        """Return the values of all processes, this one's with their graph.

        A term of them, the same number everywhere, then has in each process the gradient of its own
        pairs alone; `averaged` makes the mean over processes whole.
        """
        if self.world_size == 1:
            return values
        everything = self.gather(values)
        own = self.own(values.shape[0])
        return torch.cat([everything[: own.start], values, everything[own.stop :]])

    def averaged(self, term: Tensor) -> Tensor:
        """Return the same number with W times the gradient, for what is averaged over processes."""
        if self.world_size == 1:
            return term
        fixed = term.detach()
        return fixed + self.world_size * (term - fixed)


class _GatherWithGradient(torch.autograd.Function):
    """all_gather whose backward adds up what every process has made of these values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, processes: Processes) -> Tensor:
        ctx.own = processes.own(values.shape[0])
        return processes.gather(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad)
        return grad[ctx.own], None
