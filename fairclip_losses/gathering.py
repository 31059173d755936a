"""Features of all processes' pairs, with their gradients: for losses of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .distributed import Processes


def gather_with_gradient(values: Tensor, rank: int, world_size: int) -> Tensor:
    """Return the values (b, ...) of all processes, (W b, ...) rank by rank, with their gradients.

    What every process makes of this one's values comes back as gradient here, so that the mean over
    processes of losses of their own pairs against all has, averaged by DistributedDataParallel, the
    gradient of one process on the whole batch. Every process must pass as many values and call this
    as often, backward included. In one process the values are returned as they are.
    """
    if world_size == 1:
        return values
    gathered: Tensor = _GatherWithGradient.apply(values, Processes(rank, world_size))
    return gathered


class _GatherWithGradient(torch.autograd.Function):
    """all_gather whose backward adds up what every process has made of these values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, processes: Processes) -> Tensor:
        ctx.own = processes.own(values.shape[0])
        return processes.gather(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(grad)
        return grad[ctx.own], None
