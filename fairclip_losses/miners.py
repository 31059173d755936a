"""Dynamic bad pair mining: find bad image-text pairs from the history of each pair's own loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from fairclip_losses.functional import (
    CLEAN,
    FAULTY,
    KIND_NAMES,
    NOISY,
    History,
    Weighting,
    bad_pair_kinds,
    bad_pair_weights,
    history_statistics,
    history_z_score,
    mixture_pair_kinds,
    pair_history,
    visit_weight,
)
from fairclip_losses.functional.mining import check_choice, check_mixture_threshold, check_sigma
from fairclip_losses.functional.options import check_integer

__all__ = ["BadPairMiner", "EpochSummary", "MinerReport"]

_F = TypeVar("_F", bound=Callable[..., Any])

Detector = Literal["threshold", "mixture"]
Record = Literal["raw", "weighted"]

_INT64_MIN = -(1 << 63)

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


@dataclass(frozen=True)
class EpochSummary:
    """What :meth:`BadPairMiner.end_epoch` found.

    Attributes:
        epoch: number of epochs over, this one included.
        seen: number of pairs with a recorded loss, in all epochs so far.
        noisy: number of pairs now flagged noisy.
        faulty: number of pairs now flagged faulty.
        mean: mean of the pairs' histories; 0 where no pair was seen.
        std: population standard deviation of the pairs' histories; 0 where no pair was seen.
    """

    epoch: int
    seen: int
    noisy: int
    faulty: int
    mean: float
    std: float


@dataclass(frozen=True, eq=False)
class MinerReport:
    """The memory of the visited pairs, in ascending order of their ids; every array has shape (N,).

    Attributes:
        ids: pair ids, int64.
        visits: number of recorded losses, int64.
        history: history of the losses up to now, float64.
        z_score: the history standardised by the mean and deviation of the last ``end_epoch``,
            float64; 0 where the deviation is 0, NaN before the first ``end_epoch``.
        kind: ``"clean"``, ``"noisy"`` or ``"faulty"``, as flagged by the last ``end_epoch``.
        weight: weight of the pair at its last recorded loss, float64.
    """

    ids: npt.NDArray[np.int64]
    visits: npt.NDArray[np.int64]
    history: npt.NDArray[np.float64]
    z_score: npt.NDArray[np.float64]
    kind: npt.NDArray[np.str_]
    weight: npt.NDArray[np.float64]

    def __len__(self) -> int:
        """Return the number of visited pairs."""
        return len(self.ids)

    def counts(self) -> dict[str, int]:
        """Return the number of pairs of each kind; a kind without a pair counts 0."""
        return {name: int(np.count_nonzero(self.kind == name)) for name in KIND_NAMES}

    def flagged(self) -> MinerReport:
        """Return the report of the noisy and faulty pairs alone."""
        keep = self.kind != KIND_NAMES[CLEAN]
        return MinerReport(
            ids=self.ids[keep],
            visits=self.visits[keep],
            history=self.history[keep],
            z_score=self.z_score[keep],
            kind=self.kind[keep],
            weight=self.weight[keep],
        )


class BadPairMiner(nn.Module):
    r"""Weigh down the pairs whose loss history shows that they are bad.

    The miner remembers the losses :math:`l_{k,v}` of every pair `k` by its stable id, whatever the
    order and the batches they come in. :meth:`end_epoch` computes each pair's history :math:`m_k`,
    the mean :math:`\mu` and population deviation :math:`\sigma` of the histories, and flags

    - noisy pairs, learnt too easily: :math:`m_k \le \mu - \beta_n \sigma`;
    - faulty pairs, never learnt: :math:`m_k \ge \mu + \beta_f \sigma`.

    Until the next :meth:`end_epoch` a flagged pair weighs :math:`\exp(-z^2 / 2)`,
    :math:`z = (l - \mu) / \sigma` at its current loss, and every other pair exactly 1. Use it as::

        miner = BadPairMiner(num_pairs=len(dataset))
        for epoch in range(epochs):
            for images, texts, ids in loader:
                losses = per_pair_losses(model(images, texts))      # (B,)
                (miner(losses, ids) * losses).mean().backward()
            miner.end_epoch()

    ``forward`` neither waits for the device nor loops over the samples, and with `num_pairs` given
    it compiles into one graph. The whole memory is in buffers, so it is saved and resumed by
    ``state_dict``; on the CPU a resumed run equals the uninterrupted one bit for bit. (On a GPU an
    id that is twice in a batch may be summed in either order, unless
    ``torch.use_deterministic_algorithms`` is set.) The memory follows the losses to their device at
    the first batch; casts such as ``.half()`` move it but never change its precision. It takes 13
    bytes for each pair, 17 with ``history="linear"``, and 8 more for the id itself where ids are
    streamed.

    With ``num_pairs=None`` any int64 is an id. The visits of the running epoch are then kept in a
    log, which joins the sorted table of pairs at :meth:`end_epoch`, before the state is saved or
    reported, and whenever it holds more than 65,536 visits and an eighth of the table (only then
    does ``forward`` wait for the device).

    Args:
        num_pairs: number of pairs, the ids being 0..num_pairs-1; None takes any int64 ids.
        total_epochs: number of epochs `E` of the run. Used (and needed) only by the linear history
            with ``renormalize=False``.
        warmup_epochs: the first call of ``end_epoch`` that flags; 0 is the same as 1.
        noisy_sigma: :math:`\beta_n`, 0 or more; infinity flags no pair as noisy.
        faulty_sigma: :math:`\beta_f`, 0 or more; infinity flags no pair as faulty.
        history: ``"mean"`` of the losses, or ``"linear"``, where a visit in epoch `e` (the number
            of ``end_epoch`` calls before it) weighs `1 + e`.
        weighting: ``"relative"``, :math:`\exp(-z^2 / 2)` in (0, 1]; or ``"density"``, the published
            :math:`\mathcal N(l; \mu, \sigma^2)`, which exceeds 1 where :math:`\sigma < 0.399`.
        renormalize: divide the linear history by the sum of its weights. False is the published
            code's mean of :math:`(1 + e) l / E`, for comparison.
        record: ``"raw"`` losses, or ``"weighted"``: the losses after they are weighed down, which
            feeds the flags back into the history (a defect of published code, for comparison).
        detector: of faulty pairs: ``"threshold"`` as above, or ``"mixture"``: the posterior of the
            higher-mean component of a two-component Gaussian mixture fitted to the histories
            (:func:`~fairclip_losses.functional.mixture_pair_kinds`). Noisy pairs are found by
            `noisy_sigma` either way.
        mixture_threshold: least posterior of a faulty pair, in (0, 1].
        validate: check the values of the ids at once, which waits for the device. None does so for
            ids that are on the CPU. Without the check an id outside the range weighs 1, is not
            recorded, and makes the next ``end_epoch`` raise.

    Raises:
        ValueError: for an argument outside what is said above.

    Source: Lan et al., ICLR 2024 (arXiv:2302.03357), dynamic bad pair mining, applied to image-text
    pairs by Bansal et al. (arXiv:2505.03153).
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
        num_pairs: int | None = None,
        *,
        total_epochs: int | None = None,
        warmup_epochs: int = 1,
        noisy_sigma: float = 3.0,
        faulty_sigma: float = 3.0,
        history: History = "mean",
        weighting: Weighting = "relative",
        renormalize: bool = True,
        record: Record = "raw",
        detector: Detector = "threshold",
        mixture_threshold: float = 0.5,
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        check_sigma("noisy_sigma", noisy_sigma)
        check_sigma("faulty_sigma", faulty_sigma)
        check_choice("history", history, ("mean", "linear"))
        check_choice("weighting", weighting, ("relative", "density"))
        check_choice("record", record, ("raw", "weighted"))
        check_choice("detector", detector, ("threshold", "mixture"))
        check_mixture_threshold(mixture_threshold)
        if history == "linear" and not renormalize and total_epochs is None:
            raise ValueError(
                "history='linear' with renormalize=False needs total_epochs, got total_epochs=None"
            )
        self.num_pairs = None if num_pairs is None else check_integer("num_pairs", num_pairs, 1)
        self.total_epochs = (
            None if total_epochs is None else check_integer("total_epochs", total_epochs, 1)
        )
        self.warmup_epochs = check_integer("warmup_epochs", warmup_epochs, 0)
        self.noisy_sigma = noisy_sigma
        self.faulty_sigma = faulty_sigma
        self.history: History = history
        self.weighting: Weighting = weighting
        self.renormalize = renormalize
        self.record: Record = record
        self.detector: Detector = detector
        self.mixture_threshold = mixture_threshold
        self.validate = validate

        size = self.num_pairs or 0
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
        self.register_buffer("invalid_largest", torch.full((), _INT64_MIN))

    # ---------------------------------------------------------------------------------------- use

    def forward(
        self, pair_losses: Tensor, pair_ids: Tensor, *, record: bool | None = None
    ) -> Tensor:
        """Return the weight of each pair in the batch, and record its loss.

        Args:
            pair_losses: raw loss of each pair, shape (B,), floating point. One that is not finite
                (in float32) is not recorded and weighs 1.
            pair_ids: stable id of each pair, shape (B,), integers. An id that is there twice counts
                as two visits.
            record: whether to record; None records in training mode only. Give False where a batch
                is weighed again, as gradient accumulation does.

        Returns:
            (B,) detached weights in the losses' dtype (float32 for half precision), by the flags
            and statistics of the last ``end_epoch``.

        Raises:
            ValueError: for a wrong dtype or shape, and, where the values are checked (see
                `validate`), an id outside 0..num_pairs-1; nothing is recorded then.
        """
        self.check(pair_losses, pair_ids)
        losses = pair_losses.detach()
        losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
        ids = pair_ids.to(torch.int64)
        ids = ids.to(losses.device, non_blocking=losses.device.type == "cuda")
        if self.visits.device != losses.device:
            with torch.inference_mode(False):
                self.to(losses.device)
        slots, known = self._locate(ids)
        if self.kind.numel():
            kinds = self.kind[slots].masked_fill(~known, CLEAN)
        else:
            kinds = torch.zeros_like(ids)
        weights = bad_pair_weights(losses, kinds, self.mean, self.std, self.weighting)
        if self.training if record is None else record:
            stored = (losses if self.record == "raw" else losses * weights).float()
            if self.num_pairs is None:
                self._log(ids, stored)
            else:
                outside = ids.masked_fill(known, _INT64_MIN)
                largest = torch.cat([self.invalid_largest.view(1), outside]).amax()
                self.invalid_largest.copy_(largest)
                self.invalid_count += (~known).sum()
                self._accumulate(slots, stored, known & torch.isfinite(stored))
        return weights

    def check(self, pair_losses: Tensor, pair_ids: Tensor) -> None:
        """Refuse what ``forward`` would refuse, and record nothing.

        Raises:
            ValueError: as ``forward`` does.
        """
        for name, value in (("pair_losses", pair_losses), ("pair_ids", pair_ids)):
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
        if not pair_losses.is_floating_point():
            raise ValueError(f"pair_losses must be floating point, got {pair_losses.dtype}")
        if (
            pair_ids.is_floating_point()
            or pair_ids.is_complex()
            or pair_ids.dtype in (torch.bool, torch.uint64)
        ):
            raise ValueError(f"pair_ids must be integers (int64), got {pair_ids.dtype}")
        if pair_losses.ndim != 1 or pair_ids.ndim != 1 or len(pair_losses) != len(pair_ids):
            raise ValueError(
                "pair_losses and pair_ids must both have shape (B,), "
                f"got {tuple(pair_losses.shape)} and {tuple(pair_ids.shape)}"
            )
        check = pair_ids.device.type == "cpu" if self.validate is None else self.validate
        # A compiled graph cannot raise on a value; there the ids are counted, as on a GPU.
        if check and self.num_pairs is not None and not torch.compiler.is_compiling():
            ids = pair_ids.to(torch.int64)
            outside = (ids < 0) | (ids >= self.num_pairs)
            if bool(outside.any()):
                first = int(outside.nonzero()[0])
                raise ValueError(
                    f"pair_ids must lie in 0..{self._last_id()}, "
                    f"got {int(ids[first])} at position {first}"
                )

    def end_epoch(self) -> EpochSummary:
        """End the epoch: refresh the statistics and, after the warm-up, the flags.

        Returns:
            The epoch's summary, in Python numbers (this waits for the device).

        Raises:
            ValueError: if ids outside 0..num_pairs-1 came since the last call. They are forgotten
                and nothing else is changed, so that a second call ends the epoch without them.
        """
        invalid = int(self.invalid_count)
        if invalid:
            largest = int(self.invalid_largest)
            self.invalid_count.zero_()
            self.invalid_largest.fill_(_INT64_MIN)
            raise ValueError(
                f"pair ids must lie in 0..{self._last_id()}, got {invalid} outside that range "
                f"since the last end_epoch (the largest is {largest})"
            )
        self._consolidate()
        history = self._history()
        mean, std = history_statistics(history)
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.epoch += 1
        epoch = int(self.epoch)
        if epoch >= self.warmup_epochs:
            if self.detector == "mixture":
                kinds = mixture_pair_kinds(
                    history, mean, std, self.noisy_sigma, self.mixture_threshold
                )
            else:
                kinds = bad_pair_kinds(history, mean, std, self.noisy_sigma, self.faulty_sigma)
            self.kind.copy_(kinds)
        return EpochSummary(
            epoch=epoch,
            seen=int(torch.count_nonzero(self.visits)),
            noisy=int((self.kind == NOISY).sum()),
            faulty=int((self.kind == FAULTY).sum()),
            mean=float(mean),
            std=float(std),
        )

    def report(self) -> MinerReport:
        """Return the memory of the visited pairs as NumPy arrays (this waits for the device)."""
        self._consolidate()
        slots = self.visits.nonzero().squeeze(1)
        # Every pair of the table has a visit, so there the slots leave nothing out.
        ids = slots if self.num_pairs is not None else self.table_ids
        history = self._history()[slots.to(self._double_device())]
        kinds = self.kind[slots]
        weights = bad_pair_weights(
            self.last_loss[slots], kinds, self.mean, self.std, self.weighting
        )
        if int(self.epoch):
            z_score = history_z_score(
                history, self.mean.to(history.device), self.std.to(history.device)
            )
        else:
            z_score = torch.full_like(history, torch.nan)
        return MinerReport(
            ids=ids.cpu().numpy().copy(),
            visits=self.visits[slots].long().cpu().numpy(),
            history=history.cpu().numpy(),
            z_score=z_score.cpu().numpy(),
            kind=np.array(KIND_NAMES)[kinds.long().cpu().numpy()],
            weight=weights.cpu().double().numpy(),
        )

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        detector = (
            f"faulty_sigma={self.faulty_sigma}"
            if self.detector == "threshold"
            else f"detector='mixture', mixture_threshold={self.mixture_threshold}"
        )
        return (
            f"num_pairs={self.num_pairs}, warmup_epochs={self.warmup_epochs}, "
            f"noisy_sigma={self.noisy_sigma}, {detector}, history={self.history!r}, "
            f"weighting={self.weighting!r}"
        )

    # ------------------------------------------------------------------------------------- memory

    def _last_id(self) -> int:
        return (self.num_pairs or 0) - 1

    def _locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Slot of each id in the memory, and whether it has one; without one the slot is any."""
        if self.num_pairs is not None:
            known = (ids >= 0) & (ids < self.num_pairs)
            return ids.masked_fill(~known, 0), known
        if self.table_ids.numel() == 0:
            return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        slots = torch.searchsorted(self.table_ids, ids.contiguous())
        slots = slots.clamp(max=self.table_ids.numel() - 1)
        return slots, self.table_ids[slots] == ids

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
            for name in self._pair_buffers():
                old = getattr(self, name)
                grown = torch.cat([old, old.new_zeros(fresh.numel())])
                setattr(self, name, grown[order])
        self._accumulate(self._locate(ids)[0], losses, torch.ones_like(ids, dtype=torch.bool))

    def _pair_buffers(self) -> list[str]:
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

    # -------------------------------------------------------------------------------------- state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BadPairMiner:
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
        return {"num_pairs": self.num_pairs, "history": self.history, "record": self.record}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Check that a saved memory means the same here.

        Other settings may change from run to run: thresholds, warm-up, weighting, detector.

        Raises:
            ValueError: for a memory of another num_pairs, history or record.
        """
        mine = self.get_extra_state()
        for name, value in mine.items():
            if name in state and state[name] != value:
                raise ValueError(
                    f"the saved memory is of {name}={state[name]!r}, "
                    f"this miner of {name}={value!r}: build the miner with {name}={state[name]!r}"
                )

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
            for name in ["table_ids", *self._pair_buffers()]:
                setattr(self, name, getattr(self, name).new_zeros(len(ids)))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _zeros_float32(size: int, device: torch.device | None = None) -> Tensor:
    """Return zeros in float32, whatever the default dtype is."""
    return torch.zeros(size, dtype=torch.float32, device=device)
