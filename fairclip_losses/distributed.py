"""A batch that is spread over processes, brought together by the conventions of open_clip's losses.

Each process holds b pairs of a global batch of W b, rank by rank. The processes' gradients are
averaged afterwards (by DistributedDataParallel), which decides how a term must be scaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Route = Literal["bidir", "shift", "reduce", "gather"]


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

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of the values over all processes, the same in each."""
        if self.world_size == 1:
            return values
        values = values.detach().clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(values)
        return values

    def gather_uneven(self, values: Tensor, to: int | None = None) -> list[Tensor]:
        """Return each process's values, whose first dimensions differ; waits for the device.

        With ``to`` only that process is given them; every other has its own alone.
        """
        if self.world_size == 1:
            return [values]
        sizes = self.gather(torch.tensor([len(values)], device=values.device)).tolist()
        padded = values.new_zeros(max(sizes), *values.shape[1:])
        padded[: len(values)] = values
        if to not in (None, self.rank):
            torch.distributed.gather(padded, dst=to)
            return [values]
        parts = [torch.empty_like(padded) for _ in sizes]
        if to is None:
            torch.distributed.all_gather(parts, padded)
        else:
            torch.distributed.gather(padded, parts, dst=to)
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]

    def others(self, values: Tensor, route: Route) -> Iterator[tuple[int, Tensor]]:
        """Yield (rank, values) of every other process, in exchanges as many in each of them.

        ``bidir`` and ``shift`` hand them on round a ring, both ways or one, and ``reduce`` has each
        process in turn tell all others: one or two blocks are held at a time. ``gather`` holds all.
        """
        values = values.detach().contiguous()
        if route == "gather":
            for rank, block in enumerate(self.gather(values).chunk(self.world_size)):
                if rank != self.rank:
                    yield rank, block
        elif route == "reduce":
            for rank in range(self.world_size):
                block = values if rank == self.rank else torch.empty_like(values)
                torch.distributed.broadcast(block, rank)
                if rank != self.rank:
                    yield rank, block
        else:
            yield from self._round_the_ring(values, both_ways=route == "bidir")

    def _round_the_ring(self, values: Tensor, both_ways: bool) -> Iterator[tuple[int, Tensor]]:
        right = left = values  # what goes on to each side
        for hop in range(1, (self.world_size // 2 if both_ways else self.world_size - 1) + 1):
            two = both_ways and 2 * hop < self.world_size  # opposite each other, one way is enough
            sent = [(right, 1), (left, -1)] if two else [(right, 1)]
            received = [torch.empty_like(values) for _ in sent]
            operations = [
                operation
                for (block, side), place in zip(sent, received, strict=True)
                for operation in (
                    self._with(torch.distributed.isend, block, side),
                    self._with(torch.distributed.irecv, place, -side),
                )
            ]
            for request in torch.distributed.batch_isend_irecv(operations):
                request.wait()
            for (_, side), block in zip(sent, received, strict=True):
                yield (self.rank - side * hop) % self.world_size, block
            right, left = received[0], received[-1]

    def _with(self, operation: Any, values: Tensor, side: int) -> Any:
        """Return a sending or receiving with the neighbour on that side of the ring."""
        neighbour = (self.rank + side) % self.world_size
        return torch.distributed.P2POp(operation, values, neighbour)


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
