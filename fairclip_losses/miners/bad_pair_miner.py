"""Dynamic bad pair mining: find bad image-text pairs from the history of each pair's own loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..functional import (
    CLEAN,
    FAULTY,
    KIND_NAMES,
    NOISY,
    History,
    bad_pair_kinds,
    faulty_posterior,
    history_statistics,
    history_z_score,
)
from ..functional import Weighting as GaussianWeighting
from ..functional.mining import flagged_weights
from ..validation import (
    check_choice,
    check_integer,
    check_pair_rows,
    check_share,
    check_sigma,
    should_validate,
)
from .pair_memory import PairMemory, Record

Detector = Literal["threshold", "mixture"]
Weighting = Literal["relative", "density", "posterior"]


@dataclass(frozen=True)
class EpochSummary:
    """What :meth:`BadPairMiner.end_epoch` found."""

    epoch: int  # epochs over, this one included
    seen: int  # pairs with a recorded loss, in all epochs so far
    noisy: int  # pairs now flagged noisy
    faulty: int  # pairs now flagged faulty
    mean: float  # of the pairs' histories; 0 where no pair was seen
    std: float  # population standard deviation of them; 0 where no pair was seen


@dataclass(frozen=True, eq=False)
class MinerReport:
    """The memory of the visited pairs, in ascending order of their ids; every array has shape (N,).

    Attributes:
        ids: pair ids.
        visits: number of recorded losses.
        history: history of the losses up to now.
        z_score: the history standardised by the mean and deviation of the last ``end_epoch``; 0
            where the deviation is 0, NaN before the first ``end_epoch``.
        kind: ``"clean"``, ``"noisy"`` or ``"faulty"``, as flagged by the last ``end_epoch``.
        weight: weight of the pair at its last recorded loss.
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
        return MinerReport(**{name: values[keep] for name, values in vars(self).items()})


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

    ``forward`` does not wait for the device, and with `num_pairs` it compiles into one graph. All
    state is in `memory`, and it is saved and resumed by ``state_dict``; on the CPU a
    resumed run equals the uninterrupted one bit for bit. (On a GPU an id that is twice in a batch
    may be summed in either order, unless ``torch.use_deterministic_algorithms`` is set.) The memory
    follows the losses to their device at the first batch; casts such as ``.half()`` never change
    its precision. It takes 13 bytes for each pair, 17 with ``history="linear"``, and 8 more for the
    id itself where ids are streamed.

    With ``num_pairs=None`` any int64 is an id. Visits then wait in a log, which joins the table of
    pairs at :meth:`end_epoch`, before the state is saved or reported, and when it is full (of the
    larger of 65,536 visits and an eighth of the table; only then ``forward`` waits for the device).

    The defaults are the preset ``aligned``; the published constants are in the presets ``paper``
    and ``official``.

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
            :math:`\mathcal N(l; \mu, \sigma^2)`, which exceeds 1 where :math:`\sigma < 0.399`; or
            ``"posterior"``: every pair, flagged or not, weighs its posterior of being clean by the
            mixture (noisy pairs as with ``"relative"``). Needs ``detector="mixture"``.
        renormalize: divide the linear history by the sum of its weights. False is the published
            code's mean of :math:`(1 + e) l / E`, for comparison.
        record: ``"raw"`` losses, or ``"weighted"``: the losses after they are weighed down, which
            feeds the flags back into the history (a defect of published code, for comparison).
        detector: of faulty pairs: ``"threshold"`` as above, or ``"mixture"``: the posterior of the
            higher-mean component of a two-component Gaussian mixture fitted to the histories, where
            these have two modes (:func:`~fairclip_losses.functional.faulty_posterior`). Noisy pairs
            are found by `noisy_sigma` either way.
        mixture_threshold: least posterior of a faulty pair, in (0, 1].
        validate: check the values of the ids at once, which waits for the device; None checks ids
            that are on the CPU. Without the check an id outside the range weighs 1, is not
            recorded, and makes the next ``end_epoch`` raise.

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
        faulty_sigma: float = 1.0,
        history: History = "mean",
        weighting: Weighting = "relative",
        renormalize: bool = True,
        record: Record = "raw",
        detector: Detector = "threshold",
        mixture_threshold: float = 0.5,
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        check_choice("history", history, ("mean", "linear"))
        check_choice("weighting", weighting, ("relative", "density", "posterior"))
        check_choice("record", record, ("raw", "weighted"))
        check_choice("detector", detector, ("threshold", "mixture"))
        if weighting == "posterior" and detector != "mixture":
            raise ValueError(
                f"weighting='posterior' needs detector='mixture', got detector={detector!r}"
            )
        check_sigma("noisy_sigma", noisy_sigma)
        check_sigma("faulty_sigma", faulty_sigma)
        check_share("mixture_threshold", mixture_threshold)
        if num_pairs is not None:
            num_pairs = check_integer("num_pairs", num_pairs, 1)
        if total_epochs is not None:
            total_epochs = check_integer("total_epochs", total_epochs, 1)
        published = history == "linear" and not renormalize
        if published and total_epochs is None:
            raise ValueError(
                "history='linear' with renormalize=False needs total_epochs, got total_epochs=None"
            )
        self.num_pairs = num_pairs
        self.total_epochs = total_epochs
        self.history: History = history
        self.renormalize = renormalize
        self.warmup_epochs = check_integer("warmup_epochs", warmup_epochs, 0)
        self.noisy_sigma = noisy_sigma
        self.faulty_sigma = faulty_sigma
        self.weighting: Weighting = weighting
        self.record: Record = record
        self.detector: Detector = detector
        self.mixture_threshold = mixture_threshold
        self.validate = validate
        divisor = total_epochs if published else None
        self.memory = PairMemory(num_pairs, history, divisor, record, weighting == "posterior")

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
        memory = self.memory
        losses = pair_losses.detach()
        losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
        ids = pair_ids.long().to(losses.device, non_blocking=losses.device.type == "cuda")
        if memory.visits.device != losses.device:
            with torch.inference_mode(False):
                memory.to(losses.device)
        usable = losses.float().abs() < torch.inf
        in_range = None
        if self.num_pairs is not None and not should_validate(pair_ids, self.validate):
            in_range = (ids >= 0) & (ids < self.num_pairs)
            usable &= in_range
        rows = memory.rows_of(ids, usable)
        weights = self._weights(losses, rows)
        if self.training if record is None else record:
            if in_range is not None:
                memory.count_invalid(ids, ~in_range)
            recorded = losses if self.record == "raw" else losses * weights
            memory.add(ids, rows, recorded.float(), usable)
        return weights

    def check(self, pair_losses: Tensor, pair_ids: Tensor) -> None:
        """Refuse what ``forward`` would refuse, by the same errors, and record nothing."""
        check_pair_rows(pair_losses, pair_ids)
        # A compiled graph cannot raise on a value; there the ids are counted, as on a GPU.
        checked = len(pair_ids) and should_validate(pair_ids, self.validate)
        if self.num_pairs is None or not checked:
            return
        least, largest = torch.aminmax(pair_ids)
        if int(least) < 0 or int(largest) >= self.num_pairs:
            ids = pair_ids.to(torch.int64)
            first = int(((ids < 0) | (ids >= self.num_pairs)).nonzero()[0])
            raise ValueError(
                f"pair_ids must lie in 0..{self.num_pairs - 1}, "
                f"got {int(ids[first])} at position {first}"
            )

    def _weights(self, losses: Tensor, rows: Tensor) -> Tensor:
        """Return the weights of the pairs in these rows at their losses."""
        memory = self.memory
        kind = memory.kind.index_select(0, rows)
        gaussian = kind.bool() if memory.posterior is None else kind == NOISY  # CLEAN is 0
        form: GaussianWeighting = "density" if self.weighting == "density" else "relative"
        weights = flagged_weights(losses, gaussian, memory.mean, memory.std, form)
        if memory.posterior is None:
            return weights
        clean = (1 - memory.posterior.index_select(0, rows)).to(losses.dtype)
        return torch.where(gaussian, weights, clean.clamp(min=torch.finfo(losses.dtype).tiny))

    def end_epoch(self) -> EpochSummary:
        """Refresh the statistics and, after the warm-up, the flags (this waits for the device).

        Raises:
            ValueError: if ids outside 0..num_pairs-1 came since the last call. They are forgotten
                and nothing else is changed, so that a second call ends the epoch without them.
        """
        memory = self.memory
        memory.raise_invalid()
        memory.consolidate()
        history = memory.histories()
        mean, std = history_statistics(history)
        memory.mean.copy_(mean)
        memory.std.copy_(std)
        memory.epoch += 1
        epoch = int(memory.epoch)
        # The flags are always of these statistics, so that the weights never divide by 0.
        flags = epoch >= self.warmup_epochs
        mixed = self.detector == "mixture"
        sigmas = self.noisy_sigma, torch.inf if mixed else self.faulty_sigma
        kinds = bad_pair_kinds(history, mean, std, *(sigmas if flags else (torch.inf, torch.inf)))
        if flags and mixed:
            posterior = faulty_posterior(history)
            kinds.masked_fill_((posterior >= self.mixture_threshold).to(kinds.device), FAULTY)
            if memory.posterior is not None:
                memory.posterior.copy_(posterior)
        memory.kind.copy_(kinds)
        counted = (memory.visits > 0, memory.kind == NOISY, memory.kind == FAULTY)
        seen, noisy, faulty = torch.stack([each.sum() for each in counted]).tolist()
        return EpochSummary(epoch, seen, noisy, faulty, float(mean), float(std))

    def report(self) -> MinerReport:
        """Return the memory of the visited pairs as NumPy arrays (this waits for the device)."""
        memory = self.memory
        memory.consolidate()
        rows = memory.visits.nonzero().squeeze(1)
        history = memory.histories()
        history = history[rows.to(history.device)]
        mean, std = memory.mean, memory.std
        weights = self._weights(memory.last_loss[rows], rows)
        z_score = history_z_score(history, mean.to(history.device), std.to(history.device))
        if not int(memory.epoch):
            z_score.fill_(torch.nan)
        return MinerReport(
            ids=(rows if self.num_pairs else memory.table_ids[rows]).cpu().numpy(),
            visits=memory.visits[rows].cpu().long().numpy(),
            history=history.cpu().numpy(),
            z_score=z_score.cpu().numpy(),
            kind=np.array(KIND_NAMES)[memory.kind[rows].cpu().numpy()],
            weight=weights.cpu().double().numpy(),
        )

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        faulty = f"faulty_sigma={self.faulty_sigma}"
        if self.detector == "mixture":
            faulty = f"detector='mixture', mixture_threshold={self.mixture_threshold}"
        return (
            f"num_pairs={self.num_pairs}, warmup_epochs={self.warmup_epochs}, "
            f"noisy_sigma={self.noisy_sigma}, {faulty}, history={self.history!r}, "
            f"weighting={self.weighting!r}"
        )
