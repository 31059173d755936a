"""A batch that is spread over processes, brought together by the conventions of open_clip's losses.

Each process holds b pairs of a global batch of W b, rank by rank. The processes' gradients are
averaged afterwards (by DistributedDataParallel), which decides how a term must be scaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Route = Literal["bidir", "shift", "reduce", "gather"]
T = TypeVar("T")


def gather_objects(value: T) -> list[T]:
    """Return what all processes pass, rank by rank; every process must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@dataclass(frozen=True)
class Processes:
    """The processes that a loss is spread over, and this one's place among them."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def of(cls, loss: Any) -> Processes:
        """Read them off a loss as open_clip's losses hold them; other losses run in one process."""
        return cls(int(getattr(loss, "rank", 0)), int(getattr(loss, "world_size", 1)))

    @classmethod
    def of_group(cls) -> Processes:
        """Return those of torch's process group; without one there is one process."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def own(self, local_size: int) -> slice:
        """Return the place of this process's pairs in the global batch."""
        return slice(self.rank * local_size, (self.rank + 1) * local_size)

    def gather(self, values: Tensor) -> Tensor:
        """Return the values of all processes, (W b, ...) from (b, ...), without gradients."""
        if self.world_size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(parts, values.detach().contiguous())
        return torch.cat(parts)

    def gather_live(self, values: Tensor, averaged: bool) -> Tensor:
        """Return the values of all processes, this one's with their graph.

        A term of them, the same number everywhere, then has in each process the gradient of its own
        pairs alone; ``averaged`` makes it W times that, for what is averaged over processes.
        """
        own, everything = self.own(len(values)), self.gather(values)
        if averaged:
            values = everything[own] + self.world_size * (values - everything[own])
        return torch.cat([everything[: own.start], values, everything[own.stop :]])

    def others(self, values: Tensor, route: Route) -> Iterator[tuple[int, Tensor]]:
        """Yield (rank, values) of every other process, in exchanges as many in each of them.

        ``bidir`` and ``shift`` pass them around a ring, both ways or one, and with ``reduce`` each
        process in turn tells all others: one or two blocks are held at once. ``gather`` holds all.
        """
        values = values.detach().contiguous()
        if route == "gather":
            for rank, block in enumerate(self.gather(values).chunk(self.world_size)):
                if rank != self.rank:
                    yield rank, block
        elif route == "reduce":
            for rank in range(self.world_size):
                block = values if rank == self.rank else torch.empty_like(values)
                dist.broadcast(block, rank)
                if rank != self.rank:
                    yield rank, block
        else:
            yield from self._around_the_ring(values, both_ways=route == "bidir")

    def _around_the_ring(self, values: Tensor, both_ways: bool) -> Iterator[tuple[int, Tensor]]:
        right = left = values  # what goes on to each side
        for hop in range(1, (self.world_size // 2 if both_ways else self.world_size - 1) + 1):
            two = both_ways and 2 * hop < self.world_size  # opposite each other, one way is enough
            sent = [(right, 1), (left, -1)] if two else [(right, 1)]
            received = [torch.empty_like(values) for _ in sent]
            operations = []
            for (block, side), place in zip(sent, received, strict=True):
                to, source = ((self.rank + s) % self.world_size for s in (side, -side))
                operations.append(dist.P2POp(dist.isend, block, to))
                operations.append(dist.P2POp(dist.irecv, place, source))
            for request in dist.batch_isend_irecv(operations):
                request.wait()
            for (_, side), block in zip(sent, received, strict=True):
                yield (self.rank - side * hop) % self.world_size, block
            right, left = received[0], received[-1]


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
        dist.all_reduce(grad)
        return grad[ctx.own], None
