"""What takes more than one shard: a memory put together from another's, all histories at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributed import Processes
from ..functional.mining import MIXTURE_POINTS, order_statistics

if TYPE_CHECKING:
    from .memory import PairMemory

_SCALARS = ("epoch", "mean", "std", "invalid_count", "invalid_largest")


def collect_shards(
    memory: PairMemory, states: Iterable[Mapping[str, Any]]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return what ``memory`` takes out of all shards of another, and leave it as it is.

    Returns:
        The sorted ids, the buffers with a row for each of them, and the buffers of one number.

    Raises:
        ValueError: a shard of another kind of memory, or shards that are not all there once.
    """
    device = memory.visits.device
    own_shard = memory.get_extra_state()["shard"]
    ids: list[Tensor] = []
    columns: list[dict[str, Tensor]] = []
    scalars: dict[str, Tensor] = {}
    missing: set[int] | None = None
    for state in states:
        meaning = dict(state.get("_extra_state", {}))
        rank, world_size = meaning.pop("shard", [0, 1])
        memory.set_extra_state({**meaning, "shard": own_shard})
        missing = set(range(world_size)) if missing is None else missing
        if rank not in missing:
            raise ValueError(f"expected each shard once, got shard {rank} of {world_size} again")
        missing.remove(rank)
        theirs = state.get("table_ids")
        if theirs is None:
            theirs = torch.arange(len(state["visits"])) * world_size + rank
        theirs = theirs.to(device)
        own = memory.owned(theirs)
        ids.append(theirs[own])
        columns.append({name: state[name].to(device)[own] for name in memory.pair_buffers()})
        scalars = {name: state[name].to(getattr(memory, name), copy=True) for name in _SCALARS}
    if missing is None:
        raise ValueError("expected the states of all shards, got no shard")
    if missing:
        raise ValueError(f"expected all shards, {sorted(missing)} of {world_size} missing")
    sorted_ids, order = torch.sort(torch.cat(ids))
    names = memory.pair_buffers()
    pairs = {name: torch.cat([column[name] for column in columns])[order] for name in names}
    return sorted_ids, pairs, scalars


def histories_of_all(history: Tensor, processes: Processes) -> Tensor | None:
    """Return what a mixture is fitted to where the histories are spread over shards, else None.

    All of them where they are few enough to be fitted to; of more, evenly spaced order statistics
    of each shard.
    """
    if processes.world_size == 1:
        return None
    values = history[torch.isfinite(history)]
    count = int(processes.total(torch.tensor(len(values), device=values.device)))
    values = order_statistics(values, MIXTURE_POINTS * len(values) // max(count, 1))
    return torch.cat(processes.gather_uneven(values))
