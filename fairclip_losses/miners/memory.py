"""The memory of a miner: what every pair's losses have been, by the pair's id, in buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..distributed import Processes
from ..functional import History, pair_history, visit_weight
from ..validation import check_choice, check_integer
from .shards import collect_shards

Record = Literal["raw", "weighted"]

_F = TypeVar("_F", bound=Callable[..., Any])

INT64_MIN = -(1 << 63)

# Device types that have no float64: the statistics are computed on the CPU and kept in float32.
_NO_FLOAT64 = frozenset({"mps"})

# The log of streamed visits holds this many, or this share of the pairs known, whichever is more.
_LOG_MINIMUM = 1 << 16
_LOG_SHARE = 8


def _eager(function: _F) -> _F:
    """Keep a function out of compiled graphs.

    torch.compiler.disable would do, but imports the whole compiler at once; this one, which torch's
    own modules use, does so at the first call under compilation.
    """
    disable: Any = _disable_dynamo
    return cast(_F, disable(function))


class PairMemory(nn.Module):
    """Sums of every pair's losses, its last loss and its kind, with the statistics over pairs.

    A row of the buffers is a slot. With `num_pairs` the slot is the id; else the ids known are a
    sorted table, and visits wait in a log until they join it all at once. A memory that is one
    shard of W, spread over processes, has slots for the ids that are its rank modulo W.
    """

    loss_sum: Tensor
    weight_sum: Tensor | None
    visits: Tensor
    last_loss: Tensor
    kind: Tensor
    epoch: Tensor
    mean: Tensor
    std: Tensor
    invalid_count: Tensor
    invalid_largest: Tensor
    table_ids: Tensor
    log_ids: Tensor
    log_losses: Tensor

    def __init__(
        self,
        num_pairs: int | None,
        *,
        total_epochs: int | None,
        history: History,
        renormalize: bool,
        record: Record,
        processes: Processes,
    ) -> None:
        super().__init__()
        check_choice("history", history, ("mean", "linear"))
        check_choice("record", record, ("raw", "weighted"))
        if history == "linear" and not renormalize and total_epochs is None:
            raise ValueError(
                "history='linear' with renormalize=False needs total_epochs, got total_epochs=None"
            )
        self.num_pairs = None if num_pairs is None else check_integer("num_pairs", num_pairs, 1)
        self.total_epochs = (
            None if total_epochs is None else check_integer("total_epochs", total_epochs, 1)
        )
        self.history: History = history
        self.renormalize = renormalize
        self.record: Record = record
        self.processes = processes

        if num_pairs is not None and num_pairs < processes.world_size:
            raise ValueError(
                f"num_pairs must be at least the number of shards, got num_pairs={num_pairs} and "
                f"{processes.world_size} shards"
            )
        # Ids rank, rank + W, rank + 2 W, ... below num_pairs.
        size = len(range(processes.rank, self.num_pairs or 0, processes.world_size))
        if num_pairs is None:
            self.register_buffer("table_ids", torch.zeros(0, dtype=torch.int64))
            self.register_buffer("log_ids", torch.zeros(0, dtype=torch.int64), persistent=False)
            self.register_buffer("log_losses", _zeros_float32(0), persistent=False)
            self._log_count = 0
        self.register_buffer("loss_sum", _zeros_float32(size))
        self.register_buffer("weight_sum", _zeros_float32(size) if history == "linear" else None)
        self.register_buffer("visits", torch.zeros(size, dtype=torch.int32))
        self.register_buffer("last_loss", _zeros_float32(size))
        self.register_buffer("kind", torch.zeros(size, dtype=torch.int8))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("std", torch.zeros((), dtype=torch.float64))
        self.register_buffer("invalid_count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("invalid_largest", torch.full((), INT64_MIN))

    def _last_id(self) -> int:
        return (self.num_pairs or 0) - 1

    def _in_range(self, ids: Tensor) -> Tensor:
        """Whether each id is one that a memory of num_pairs pairs can have."""
        if self.num_pairs is None:
            return torch.ones_like(ids, dtype=torch.bool)
        return (ids >= 0) & (ids < self.num_pairs)

    def owned(self, ids: Tensor) -> Tensor:
        """Whether each id is of this shard."""
        if self.processes.world_size == 1:
            return torch.ones_like(ids, dtype=torch.bool)
        return ids.remainder(self.processes.world_size) == self.processes.rank

    def _locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Slot of each id in the memory, and whether it has one; without one the slot is any."""
        if self.num_pairs is not None:
            known = self._in_range(ids)
            if self.processes.world_size > 1:
                known = known & self.owned(ids)
                ids = ids // self.processes.world_size
            return ids.masked_fill(~known, 0), known
        if self.table_ids.numel() == 0:
            return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        slots = torch.searchsorted(self.table_ids, ids.contiguous())
        slots = slots.clamp(max=self.table_ids.numel() - 1)
        return slots, self.table_ids[slots] == ids

    def _ids_of(self, slots: Tensor) -> Tensor:
        """Id of each slot, the inverse of `_locate`."""
        if self.num_pairs is None:
            return self.table_ids[slots]
        return slots * self.processes.world_size + self.processes.rank

    def _accumulate(self, slots: Tensor, losses: Tensor, recorded: Tensor) -> None:
        """Add the visits marked `recorded` to the memory of their slots, in order."""
        weight = recorded.float() * visit_weight(self.epoch, self.history)
        self.loss_sum.index_add_(0, slots, losses.masked_fill(~recorded, 0.0) * weight)
        if self.weight_sum is not None:
            self.weight_sum.index_add_(0, slots, weight)
        self.visits.index_add_(0, slots, recorded.to(self.visits.dtype))

        # The last loss of a slot that comes more than once is that of its last visit. Writing twice
        # to one place has no order, so every visit of a slot writes its last one. The sort puts the
        # visits not recorded at the end, in a slot past the last; they repeat the first write, or,
        # where nothing is recorded, write back what stands in slot 0.
        past = self.visits.numel()
        keys, order = torch.sort(slots.masked_fill(~recorded, past), stable=True)
        last = losses[order][torch.searchsorted(keys, keys, right=True) - 1]
        kept = keys < past
        slot = keys[:1].masked_fill(~kept[:1], 0)
        value = torch.where(kept[:1], last[:1], self.last_loss[:1])
        self.last_loss.index_copy_(0, torch.where(kept, keys, slot), torch.where(kept, last, value))

    @_eager
    @torch.inference_mode(False)
    def _log(self, ids: Tensor, losses: Tensor) -> None:
        """Append the visits to the log; a full log joins the table first."""
        if self._log_count + len(ids) > len(self.log_ids):
            self._consolidate()
            size = max(_LOG_MINIMUM, len(self.table_ids) // _LOG_SHARE, len(ids))
            self.log_ids = torch.zeros(size, dtype=torch.int64, device=ids.device)
            self.log_losses = _zeros_float32(size, ids.device)
        end = self._log_count + len(ids)
        self.log_ids[self._log_count : end] = ids
        self.log_losses[self._log_count : end] = losses
        self._log_count = end

    @torch.inference_mode(False)
    def _consolidate(self) -> None:
        """Join the log to the table of pairs."""
        if self.num_pairs is not None or self._log_count == 0:
            return
        ids, losses = self.log_ids[: self._log_count], self.log_losses[: self._log_count]
        finite = torch.isfinite(losses)
        ids, losses = ids[finite], losses[finite]
        self._log_count = 0
        fresh = torch.unique(ids)
        fresh = fresh[~self._locate(fresh)[1]]
        if fresh.numel():
            self.table_ids, order = torch.sort(torch.cat([self.table_ids, fresh]))
            for name in self.pair_buffers():
                old = getattr(self, name)
                grown = torch.cat([old, old.new_zeros(fresh.numel())])
                setattr(self, name, grown[order])
        self._accumulate(self._locate(ids)[0], losses, torch.ones_like(ids, dtype=torch.bool))

    def pair_buffers(self) -> list[str]:
        """Return the names of the buffers with a row for each pair."""
        names = ["loss_sum", "visits", "last_loss", "kind"]
        return names if self.weight_sum is None else [*names, "weight_sum"]

    def _double_device(self) -> torch.device:
        device = self.visits.device
        return torch.device("cpu") if device.type in _NO_FLOAT64 else device

    def _history(self) -> Tensor:
        device = self._double_device()
        return pair_history(
            self.loss_sum.to(device),
            self.visits.to(device),
            None if self.weight_sum is None else self.weight_sum.to(device),
            total_epochs=None if self._normalized() else self.total_epochs,
        )

    def _normalized(self) -> bool:
        return self.history == "mean" or self.renormalize

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PairMemory:
        # A cast would round the memory, so only the device is taken from what `fn` does.
        device = fn(_zeros_float32(0, self.visits.device)).device
        scalar = torch.float32 if device.type in _NO_FLOAT64 else torch.float64
        for name, buffer in self._buffers.items():
            if buffer is not None:
                dtype = scalar if name in ("mean", "std") else buffer.dtype
                self._buffers[name] = buffer.to(device=device, dtype=dtype)
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """Return the settings that give the memory its meaning, for ``state_dict``."""
        return {
            "num_pairs": self.num_pairs,
            "history": self.history,
            "record": self.record,
            "shard": [self.processes.rank, self.processes.world_size],
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Check that a saved memory means the same here.

        Other settings may change from run to run: thresholds, warm-up, weighting, detector.

        Raises:
            ValueError: for a memory of another num_pairs, history or record, or another shard.
        """
        mine = self.get_extra_state()
        shard = mine.pop("shard")
        # States of before there were shards are of the whole.
        if (saved := state.get("shard", [0, 1])) != shard:
            raise ValueError(
                f"the saved memory is shard {saved[0]} of {saved[1]}, this miner's is shard "
                f"{shard[0]} of {shard[1]}: give load_shards the states of all {saved[1]}"
            )
        for name, value in mine.items():
            if name in state and state[name] != value:
                raise ValueError(
                    f"the saved memory is of {name}={state[name]!r}, "
                    f"this miner of {name}={value!r}: build the miner with {name}={state[name]!r}"
                )

    @torch.inference_mode(False)
    def load_shards(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Take this memory's pairs out of the shards of another, of however many processes.

        A whole memory is one shard of one: this also spreads one that was whole, and brings
        together one that was spread.

        Args:
            states: the state dicts of all shards, in any order; one is held at a time.

        Raises:
            ValueError: for a memory of another num_pairs, history or record, or shards that are not
                all there once; nothing is changed then.
        """
        ids, pairs, scalars = collect_shards(self, states)
        if self.num_pairs is None:
            self._log_count = 0
            self.table_ids = ids
        for name, values in (pairs | scalars).items():
            setattr(self, name, values)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._consolidate()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            self.set_extra_state(state_dict.get(prefix + "_extra_state", {}))
        except ValueError as error:
            # Refused as a whole: nothing of this memory is overwritten.
            error_msgs.append(str(error))
            return
        ids = state_dict.get(prefix + "table_ids")
        if self.num_pairs is None and ids is not None:
            self._log_count = 0
            for name in ["table_ids", *self.pair_buffers()]:
                setattr(self, name, getattr(self, name).new_zeros(len(ids)))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _zeros_float32(size: int, device: torch.device | None = None) -> Tensor:
    """Return zeros in float32, whatever the default dtype is."""
    return torch.zeros(size, dtype=torch.float32, device=device)
