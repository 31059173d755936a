"""Dynamic bad pair mining: find bad image-text pairs from the history of each pair's own loss."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..distributed import Processes
from ..functional import (
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
    mining_numpy,
    mixture_pair_kinds,
    visit_weight,
)
from ..functional.mining import check_mixture_threshold, check_sigma
from ..validation import check_choice, check_integer
from .memory import INT64_MIN, PairMemory, Record
from .report import EpochSummary, MinerReport
from .shards import histories_of_all

__all__ = ["BadPairMiner"]

Detector = Literal["threshold", "mixture"]

_INTEGERS = frozenset(
    {torch.int64, torch.int32, torch.int16, torch.int8}
    | {torch.uint8, torch.uint16, torch.uint32}  # uint64 does not fit
)


class _Visits(NamedTuple):
    losses: Tensor
    ids: Tensor
    slots: Tensor
    known: Tensor  # whether the memory here has a slot for the id


class BadPairMiner(PairMemory):
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
        processes: None keeps every pair, so that over several processes each has the whole memory.
            A `~fairclip_losses.distributed.Processes` keeps the shard of this one of W processes:
            the pairs whose id is its rank modulo W. All of them then call ``forward`` with the same
            global batch, ``end_epoch`` and ``report`` together; weights, statistics and flags are
            those of the whole memory. A state dict is of the shard; see `load_shards`.

    Raises:
        ValueError: for an argument outside what is said above.

    Source: Lan et al., ICLR 2024 (arXiv:2302.03357), dynamic bad pair mining, applied to image-text
    pairs by Bansal et al. (arXiv:2505.03153).
    """

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
        processes: Processes | None = None,
    ) -> None:
        super().__init__(
            num_pairs,
            total_epochs=total_epochs,
            history=history,
            renormalize=renormalize,
            record=record,
            processes=processes or Processes(),
        )
        check_sigma("noisy_sigma", noisy_sigma)
        check_sigma("faulty_sigma", faulty_sigma)
        check_choice("weighting", weighting, ("relative", "density"))
        check_choice("detector", detector, ("threshold", "mixture"))
        check_mixture_threshold(mixture_threshold)
        self.warmup_epochs = check_integer("warmup_epochs", warmup_epochs, 0)
        self.noisy_sigma = noisy_sigma
        self.faulty_sigma = faulty_sigma
        self.weighting: Weighting = weighting
        self.detector: Detector = detector
        self.mixture_threshold = mixture_threshold
        self.validate = validate

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
        recording = self.training if record is None else record
        done = self._visit_numpy(pair_losses, pair_ids, recording)
        if done is not None:
            return done
        visits = self._visits(pair_losses, pair_ids)
        weights = self._own_weights(visits)
        if recording:
            self._remember(visits, weights, None)
        return self.processes.total(weights)

    def remember(
        self, pair_losses: Tensor, pair_ids: Tensor, *, kept: Tensor | None = None
    ) -> None:
        """Record a visit that ``forward`` has weighed without recording it.

        Args:
            pair_losses: as for ``forward``.
            pair_ids: as for ``forward``.
            kept: () or (B,) bool, the visits to record; None is all. The others leave no trace.

        Raises:
            ValueError: as ``forward`` does.
        """
        self.check(pair_losses, pair_ids)
        visits = self._visits(pair_losses, pair_ids)
        self._remember(visits, self._own_weights(visits), kept)

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
        if pair_ids.dtype not in _INTEGERS:
            raise ValueError(f"pair_ids must be integers (int64), got {pair_ids.dtype}")
        if pair_losses.ndim != 1 or pair_ids.ndim != 1 or len(pair_losses) != len(pair_ids):
            raise ValueError(
                "pair_losses and pair_ids must both have shape (B,), "
                f"got {tuple(pair_losses.shape)} and {tuple(pair_ids.shape)}"
            )
        if self._checks_values(pair_ids) and len(pair_ids):
            least, largest = torch.aminmax(pair_ids)
            if int(least) < 0 or int(largest) > self._last_id():
                ids = pair_ids.to(torch.int64)
                first = int(((ids < 0) | (ids > self._last_id())).nonzero()[0])
                raise ValueError(
                    f"pair_ids must lie in 0..{self._last_id()}, "
                    f"got {int(ids[first])} at position {first}"
                )

    def _checks_values(self, ids: Tensor) -> bool:
        check = ids.device.type == "cpu" if self.validate is None else self.validate
        # A compiled graph cannot raise on a value; there the ids are counted, as on a GPU.
        return check and self.num_pairs is not None and not torch.compiler.is_compiling()

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
            self.invalid_largest.fill_(INT64_MIN)
            raise ValueError(
                f"pair ids must lie in 0..{self._last_id()}, got {invalid} outside that range "
                f"since the last end_epoch (the largest is {largest})"
            )
        self._consolidate()
        history = self._history()
        shards = self.processes
        mean, std = history_statistics(
            history, total=shards.total if shards.world_size > 1 else None
        )
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.epoch += 1
        epoch = int(self.epoch)
        if epoch >= self.warmup_epochs:
            if self.detector == "mixture":
                kinds = mixture_pair_kinds(
                    history,
                    mean,
                    std,
                    self.noisy_sigma,
                    self.mixture_threshold,
                    sample=histories_of_all(history, shards),
                )
            else:
                kinds = bad_pair_kinds(history, mean, std, self.noisy_sigma, self.faulty_sigma)
            self.kind.copy_(kinds)
        counted = (self.visits > 0, self.kind == NOISY, self.kind == FAULTY)
        seen, noisy, faulty = shards.total(torch.stack([each.sum() for each in counted])).tolist()
        return EpochSummary(
            epoch=epoch,
            seen=seen,
            noisy=noisy,
            faulty=faulty,
            mean=float(mean),
            std=float(std),
        )

    def report(self, *, to: int | None = None) -> MinerReport:
        """Return the memory of the visited pairs as NumPy arrays (this waits for the device).

        Args:
            to: of a memory in shards, the one process that is given the whole, while the others
                are given their own shard; None gives it to all. All of them must call this.
        """
        self._consolidate()
        slots = self.visits.nonzero().squeeze(1)
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
        counted = torch.stack([self._ids_of(slots), self.visits[slots].long(), kinds.long()])
        measured = torch.stack([history, z_score, weights.to(history.device, torch.float64)])
        if self.processes.world_size > 1:
            counted = torch.cat(self.processes.gather_uneven(counted.t(), to)).t()
            measured = torch.cat(self.processes.gather_uneven(measured.t(), to)).t()
            order = counted[0].argsort()
            counted, measured = counted[:, order], measured[:, order]
        ids, visits, kinds = (column.numpy().copy() for column in counted.cpu())
        history_, z_score_, weight = (column.numpy().copy() for column in measured.cpu())
        return MinerReport(ids, visits, history_, z_score_, np.array(KIND_NAMES)[kinds], weight)

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        detector = (
            f"faulty_sigma={self.faulty_sigma}"
            if self.detector == "threshold"
            else f"detector='mixture', mixture_threshold={self.mixture_threshold}"
        )
        shards = self.processes.world_size
        return (
            f"num_pairs={self.num_pairs}, warmup_epochs={self.warmup_epochs}, "
            f"noisy_sigma={self.noisy_sigma}, {detector}, history={self.history!r}, "
            f"weighting={self.weighting!r}"
            + (f", shard {self.processes.rank} of {shards}" if shards > 1 else "")
        )

    def _visit_numpy(self, losses: Tensor, ids: Tensor, recording: bool) -> Tensor | None:
        """Weigh and record the usual batch on the CPU in NumPy; None where it is not the usual."""
        losses = losses.detach()
        if not (
            self._in_numpy(losses)
            and (losses.dtype, ids.dtype) == (torch.float32, torch.int64)
            and self._checks_values(ids)  # and so all are in range
            and self.record == "raw"
            and self.visits.device.type == "cpu"
            and self.processes.world_size == 1
        ):
            return None
        weight = 1.0
        if self.history == "linear":
            weight = float(visit_weight(int(self.epoch), "linear"))
        return mining_numpy.visit(
            losses, ids, self._buffers, self.weighting, record=recording, visit_weight=weight
        )

    def _weights(self, losses: Tensor, kinds: Tensor) -> Tensor:
        if self._in_numpy(losses):
            mean, std = float(self.mean), float(self.std)
            return mining_numpy.pair_weights(losses, kinds, mean, std, self.weighting)
        return bad_pair_weights(losses, kinds, self.mean, self.std, self.weighting)

    def _in_numpy(self, losses: Tensor) -> bool:
        # Without checks it is computed on the CPU as on an accelerator: reading nothing back.
        return self.validate is not False and mining_numpy.takes(losses)

    def _visits(self, pair_losses: Tensor, pair_ids: Tensor) -> _Visits:
        """Find the visits' places in the memory, which moves to their device."""
        losses = pair_losses.detach()
        losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
        ids = pair_ids.to(torch.int64)
        ids = ids.to(losses.device, non_blocking=losses.device.type == "cuda")
        if self.visits.device != losses.device:
            with torch.inference_mode(False):
                self.to(losses.device)
        return _Visits(losses, ids, *self._locate(ids))

    def _own_weights(self, visits: _Visits) -> Tensor:
        """Return the weights of the pairs of this shard; those of others are 0, to be summed."""
        losses, ids, slots, known = visits
        if self.kind.numel():
            kinds = self.kind[slots].masked_fill(~known, CLEAN)
        else:
            kinds = torch.zeros_like(ids)
        weights = self._weights(losses, kinds)
        if self.processes.world_size == 1:
            return weights
        return weights.masked_fill(~self.owned(ids), 0.0)

    def _remember(self, visits: _Visits, weights: Tensor, kept: Tensor | None) -> None:
        losses, ids, slots, known = visits
        whole = self.processes.world_size == 1
        stored = (losses if self.record == "raw" else losses * weights).float()
        if self.num_pairs is None:
            # A loss that is not finite is left out when the log joins the table.
            if not whole:
                stored = stored.masked_fill(~self.owned(ids), torch.nan)
            if kept is not None:
                stored = torch.where(kept, stored, torch.nan)
            self._log(ids, stored)
            return
        recorded = known & torch.isfinite(stored)
        invalid = ~known if whole else ~self._in_range(ids)  # counted in every shard alike
        if kept is not None:
            recorded, invalid = recorded & kept, invalid & kept
        outside = ids.masked_fill(~invalid, INT64_MIN)
        self.invalid_largest.copy_(torch.cat([self.invalid_largest.view(1), outside]).amax())
        self.invalid_count += invalid.sum()
        self._accumulate(slots, stored, recorded)
