"""Small Python objects exchanged between the processes of a run, at most a few times an epoch."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def place() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def of_all_processes(value: T) -> list[T]:
    """Return the values of all processes, rank by rank; every process must call it."""
    _, world = place()
    if world == 1:
        return [value]
    values: list[T] = [value] * world
    dist.all_gather_object(values, value)
    return values


def of_first_process(value: T) -> T:
    """Return the first process's value; every process must call it."""
    _, world = place()
    if world == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
