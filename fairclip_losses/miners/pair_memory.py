"""The memory of a miner: what every pair's losses have been, by the pair's id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..functional import FAULTY, History, pair_history
from ..state import StatefulModule, has_float64

Record = Literal["raw", "weighted"]

INT64_MIN = -(1 << 63)

# Visits that the log holds: so many (0.8 MB), or a share of the table if that is more. The table is
# then sorted anew as often as the logarithm of its size, and the log takes little beside it.
_MIN_LOG_VISITS = 1 << 16
_LOG_SHARE = 1 / 8


# What is kept of each pair; float32 whatever the default dtype is. weight_sum: linear history only;
# posterior, of being faulty: where pairs are weighed by it.
_PAIR_DTYPES = {
    "loss_sum": torch.float32,
    "weight_sum": torch.float32,
    "visits": torch.int32,
    "last_loss": torch.float32,
    "kind": torch.int8,
    "posterior": torch.float32,
}


class PairMemory(StatefulModule):
    """Sums of every pair's losses, its last loss and its kind, with the statistics over pairs.

    Each pair has a row of the state, found by :meth:`rows_of`: with `num_pairs` the row is the
    id; else the ids known are a sorted table, and visits wait in a log until they join it all at
    once. One more row, the last, is spare: unknown ids and losses that are not finite are written
    there, as zeros, so that it stays zero and its kind clean.

    The arguments are those of `BadPairMiner`; ``total_epochs`` only where the history is divided by
    it, and ``record`` is only saved, since a memory of other losses means another thing.
    ``weighs_by_posterior``: keep each pair's posterior of being faulty.
    """

    loss_sum: Tensor
    weight_sum: Tensor | None
    visits: Tensor
    last_loss: Tensor
    kind: Tensor
    posterior: Tensor | None
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
        history: History,
        total_epochs: int | None,
        record: Record,
        weighs_by_posterior: bool,
    ) -> None:
        super().__init__()
        self.num_pairs = num_pairs
        self.history: History = history
        self.total_epochs = total_epochs
        self.record: Record = record
        self.weighs_by_posterior = weighs_by_posterior
        if num_pairs is None:
            ids = torch.zeros(0, dtype=torch.int64)
            self.register_state("table_ids", ids)
            self.register_state("log_ids", ids.clone(), saved=False)
            self.register_state("log_losses", ids.float(), saved=False)
            self._log_count = 0
        self.weight_sum = self.posterior = None
        for name, dtype in self._pair_dtypes().items():
            self.register_state(name, torch.zeros((num_pairs or 0) + 1, dtype=dtype))
        self.register_state("epoch", torch.zeros((), dtype=torch.int64))
        self.register_state("mean", torch.zeros((), dtype=torch.float64))
        self.register_state("std", torch.zeros((), dtype=torch.float64))
        self.register_state("invalid_count", torch.zeros((), dtype=torch.int64))
        self.register_state("invalid_largest", torch.full((), INT64_MIN))

    @property
    def spare_row(self) -> int:
        """Row of what is not remembered."""
        return len(self.visits) - 1

    def rows_of(self, ids: Tensor, usable: Tensor) -> Tensor:
        """Row of each id; the spare row where it is not `usable` or, of streamed ids, unknown."""
        if self.num_pairs is not None:
            return torch.where(usable, ids, self.spare_row)
        if len(self.table_ids) == 0:
            return torch.zeros_like(ids)
        rows = torch.searchsorted(self.table_ids, ids.contiguous())
        found = self.table_ids[rows.clamp(max=len(self.table_ids) - 1)] == ids
        return torch.where(found & usable, rows, self.spare_row)

    def add(self, ids: Tensor, rows: Tensor, losses: Tensor, usable: Tensor) -> None:
        """Add visits in order, (B,) each: ids, their rows, float32 losses, whether to add them."""
        if self.num_pairs is None:
            self._log(ids, losses)
        else:
            self._accumulate(rows, torch.where(usable, losses, 0.0), usable)

    def count_invalid(self, ids: Tensor, invalid: Tensor) -> None:
        """Count the ids marked `invalid`, and note the largest of them, without a wait."""
        marked = torch.where(invalid, ids, INT64_MIN)
        self.invalid_largest.copy_(torch.cat([self.invalid_largest.view(1), marked]).amax())
        self.invalid_count += invalid.sum()

    def raise_invalid(self) -> None:
        """Raise if invalid ids were counted, and forget them."""
        count, largest = int(self.invalid_count), int(self.invalid_largest)
        if count and self.num_pairs is not None:
            self.invalid_count.zero_()
            self.invalid_largest.fill_(INT64_MIN)
            raise ValueError(
                f"pair ids must lie in 0..{self.num_pairs - 1}, got {count} outside that range "
                f"since the last end_epoch (the largest is {largest})"
            )

    def _accumulate(self, rows: Tensor, losses: Tensor, usable: Tensor) -> None:
        if self.weight_sum is None:
            self.loss_sum.index_add_(0, rows, losses)
        else:
            weight = usable * (self.epoch + 1)  # visit_weight of the linear history
            self.loss_sum.index_add_(0, rows, losses * weight)
            self.weight_sum.index_add_(0, rows, weight.float())
        self.visits.index_add_(0, rows, usable.int())
        # Writing twice to one row has no order, so every visit of a pair writes its last loss.
        keys, order = torch.sort(rows, stable=True)
        last = order.index_select(0, torch.searchsorted(keys, keys, right=True) - 1)
        self.last_loss.index_copy_(0, keys, losses.index_select(0, last))

    @torch.inference_mode(False)
    def _append(self, ids: Tensor, losses: Tensor) -> None:
        """Append the visits to the log; a full log joins the table first."""
        if self._log_count + len(ids) > len(self.log_ids):
            self.consolidate()
            size = max(_MIN_LOG_VISITS, int(len(self.table_ids) * _LOG_SHARE), len(ids))
            self.log_ids = torch.zeros(size, dtype=torch.int64, device=ids.device)
            self.log_losses = self.log_ids.float()
        end = self._log_count + len(ids)
        self.log_ids[self._log_count : end] = ids
        self.log_losses[self._log_count : end] = losses
        self._log_count = end

    # Out of compiled graphs; torch.compiler.disable would import the compiler with this module.
    _log: Any = torch._disable_dynamo(_append)  # type: ignore[attr-defined]

    @torch.inference_mode(False)
    def consolidate(self) -> None:
        """Join the log to the table of pairs; losses that are not finite are left out."""
        if self.num_pairs is not None or self._log_count == 0:
            return
        ids, losses = self.log_ids[: self._log_count], self.log_losses[: self._log_count]
        finite = torch.isfinite(losses)
        ids, losses = ids[finite], losses[finite]
        self._log_count = 0
        usable = torch.ones_like(ids, dtype=torch.bool)
        fresh = torch.unique(ids[self.rows_of(ids, usable) == self.spare_row])
        if len(fresh):
            self.table_ids, order = torch.sort(torch.cat([self.table_ids, fresh]))
            # New rows are zero as the spare one is: that is the first of them, the last is spare.
            order = torch.cat([order, order.new_tensor([len(order)])])
            for name in self._pair_dtypes():
                old = getattr(self, name)
                setattr(self, name, torch.cat([old, old.new_zeros(len(fresh))])[order])
        self._accumulate(self.rows_of(ids, usable), losses, usable)

    def histories(self) -> Tensor:
        """History of each row in float64, NaN without a visit; on the CPU if need be."""
        device = self.visits.device
        device = device if has_float64(device) else torch.device("cpu")
        return pair_history(
            self.loss_sum.to(device),
            self.visits.to(device),
            None if self.weight_sum is None else self.weight_sum.to(device),
            total_epochs=self.total_epochs,
        )

    def _pair_dtypes(self) -> dict[str, torch.dtype]:
        kept = {"weight_sum": self.history == "linear", "posterior": self.weighs_by_posterior}
        return {name: dtype for name, dtype in _PAIR_DTYPES.items() if kept.get(name, True)}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the settings that give the memory its meaning, for ``state_dict``."""
        return {"num_pairs": self.num_pairs, "history": self.history, "record": self.record}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Check that a saved memory means the same here.

        Other settings may change from run to run: thresholds, warm-up, weighting, detector.

        Raises:
            ValueError: for a memory of another num_pairs, history or record.
        """
        for name, value in self.get_extra_state().items():
            if name in state and state[name] != value:
                raise ValueError(
                    f"the saved memory is of {name}={state[name]!r}, "
                    f"this miner of {name}={value!r}: build the miner with {name}={state[name]!r}"
                )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.consolidate()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        try:
            self.set_extra_state(state_dict.get(prefix + "_extra_state", {}))
        except ValueError as error:
            others[-1].append(str(error))  # the error messages; nothing is overwritten
            return
        # The weighting may change: until the next end_epoch the kinds stand for the posteriors.
        posterior, kind = f"{prefix}posterior", state_dict.get(f"{prefix}kind")
        if self.posterior is None:
            state_dict.pop(posterior, None)
        elif posterior not in state_dict and kind is not None:
            state_dict[posterior] = (kind == FAULTY).float()
        ids = state_dict.get(prefix + "table_ids")
        if self.num_pairs is None and ids is not None:
            self._log_count = 0
            self.table_ids = self.table_ids.new_zeros(len(ids))
            for name in self._pair_dtypes():
                setattr(self, name, getattr(self, name).new_zeros(len(ids) + 1))
        super()._load_from_state_dict(state_dict, prefix, *others)
