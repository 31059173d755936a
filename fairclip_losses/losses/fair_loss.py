"""`FairLoss`: bad pair mining and the fairness term round an existing image-text loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..distributed import Processes
from ..functional import (
    FairnessTerms,
    Normalization,
    normalized_weights,
    official_scores,
    pair_logits,
    pair_similarities,
    reweighting,
)
from ..miners import BadPairMiner
from ..pair_terms import PairTerms, pair_terms
from ..validation import check_finite_number
from .base_loss import CallForm, changed, check_fit
from .held_visit import HeldVisit, current_scale
from .local_metadata import LocalMetadata
from .sinkhorn_fairness import SinkhornFairnessLoss

if TYPE_CHECKING:
    from ..miners import EpochSummary

Score = Literal["loss", "similarity", "official"]
MiningUnit = Literal["pair", "batch"]


class FairLossState(NamedTuple):
    """What the last call of `FairLoss` saw, detached."""

    pair_losses: Tensor  # (B,) raw, not re-weighted; of all processes, as the next two
    weights: Tensor  # (B,) of the miner, ones without one
    fairness: FairnessTerms | None


class FairLoss(nn.Module):
    r"""Put bad pair mining and the fairness term round an existing image-text loss.

    .. math:: L = \frac{1}{B} \sum_i w_i l_i + \lambda F(s, g)

    with per-pair losses l and weights w of the miner, and F the fairness term over the scores s.

    Args:
        base_loss: open_clip's ClipLoss, SigLipLoss, CoCaLoss or DistillClipLoss, or any module with
            a method ``pair_terms(**model_out)`` (`fairclip_losses.pair_terms`), in one process or
            several. Without miner and fairness any module will do.
        miner: a `BadPairMiner`, or None.
        fairness: a `SinkhornFairnessLoss`, or None.
        fairness_weight: lambda >= 0; with 0 the term is measured (see `last`) and not trained.
        score: ``"loss"``: s_i is the raw per-pair contrastive loss; ``"similarity"``: the pair's
            logit, tau v_i . t_i; ``"official"``: the published code's diag(L_I L_T^T).
        normalization: ``"batch"`` divides the weighted losses by B (published), ``"weights"`` by
            the sum of the weights.
        mining_unit: ``"pair"``, or ``"batch"``: the published code's unit, the batch's mean loss by
            its position in the epoch, for comparison only.

    ``forward`` takes what ``base_loss`` takes, positional or by name, and besides ``pair_ids``
    (B,) int64 (needed by the miner in training), ``groups`` (needed by the fairness term) and
    ``record`` (None: record the visit in training mode; False: only read, as for all but the last
    pass over one accumulated batch, so that every pass sees the same queue). It returns what
    ``base_loss`` returns; in dict form (``output_dict=True``) the fairness term is the entry
    ``fairness_loss``, otherwise it is added to the first term. Where miner and fairness are None,
    or nothing is flagged and the weight is 0, the result equals the base loss bit for bit. Scores
    that are not finite take no part in the fairness term and are not recorded; the base loss then
    is what it is without this module.

    Over several processes (a base loss with ``world_size`` > 1) each process passes its own pairs,
    as many as every other; mining and fairness see the global batch, every process keeps the
    same memory (or its shard of it, as the miner is built), and gradients averaged over processes
    are those of one process on that batch where the base loss's are (``gather_with_grad``). What
    one process refuses all refuse: they agree before they exchange anything else. On an
    accelerator, where that would wait for the device, they do so at the first call only.

    Call `end_epoch` after each epoch, and `follow` once where a gradient scaler may skip steps.
    `last` holds the last call's `FairLossState`.

    Raises:
        ValueError: a loss, miner or fairness that is no module, or options out of range; in
            ``forward`` a base loss whose per-pair terms are not known or do not fit what it
            returns, missing ids or groups, and what miner and fairness refuse. A batch that is
            refused is recorded nowhere, so that it can be repaired and passed again.

    Source: Bansal et al. (arXiv:2505.03153).
    """

    batch_position: Tensor

    def __init__(
        self,
        base_loss: nn.Module,
        miner: BadPairMiner | None = None,
        fairness: SinkhornFairnessLoss | None = None,
        fairness_weight: float = 0.1,
        score: Score = "loss",
        *,
        normalization: Normalization = "batch",
        mining_unit: MiningUnit = "pair",
    ) -> None:
        super().__init__()
        for name, part, optional in (
            ("base_loss", base_loss, ""),
            ("miner", miner, " or None"),
            ("fairness", fairness, " or None"),
        ):
            if not (isinstance(part, nn.Module) or (optional and part is None)):
                raise ValueError(
                    f"{name} must be a torch.nn.Module{optional}, got {type(part).__name__}"
                )
        self.fairness_weight = check_finite_number("fairness_weight", fairness_weight)
        for name, value, choices in (
            ("score", score, ("loss", "similarity", "official")),
            ("normalization", normalization, ("batch", "weights")),
            ("mining_unit", mining_unit, ("pair", "batch")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        self.processes = Processes.of(base_loss)
        if score == "official" and self.processes.world_size > 1:
            raise ValueError(
                "score='official' is for comparisons in one process, got a base loss with "
                f"world_size={self.processes.world_size}"
            )
        self.base_loss = base_loss
        self.miner = miner
        self.fairness = fairness
        self.score: Score = score
        self.normalization: Normalization = normalization
        self.mining_unit: MiningUnit = mining_unit
        self.register_buffer("batch_position", torch.zeros((), dtype=torch.int64))
        self.last: FairLossState | None = None
        self._scaler: Any = None
        self._held: HeldVisit | None = None
        self._agreed = False
        self._call_form = CallForm.of(base_loss)

    def forward(
        self,
        *args: Any,
        pair_ids: Tensor | None = None,
        groups: Tensor | Mapping[str, Tensor] | None = None,
        output_dict: bool = False,
        record: bool | None = None,
        **model_out: Any,
    ) -> Any:
        """Return the loss in the base loss's own form; see the class."""
        model_out = self._call_form.by_name(args, model_out)
        output_dict = model_out.pop("output_dict", output_dict)
        if self.miner is None and self.fairness is None:
            return self._call_form.call(self.base_loss, model_out, output_dict)
        self.settle()
        recording = self.training if record is None else record
        pair_ids, groups = self._metadata(pair_ids, groups, model_out, recording)
        terms = pair_terms(self.base_loss, model_out)
        base = self._call_form.call(self.base_loss, model_out, output_dict)
        check_fit(base, terms, self.processes.world_size > 1)
        losses = self._of_all_processes(terms.contrastive.detach(), model_out)
        # The miner checks before the fairness term records, and records after that has checked.
        visit = self._visit(losses, pair_ids)
        if visit is not None and isinstance(self.miner, BadPairMiner):
            self.miner.check(*visit)
        at_once = recording and self._scaler is None
        scores = self._scores(terms, model_out) if self.fairness is not None else None
        fairness = self._fairness(scores, groups, at_once)
        weights = self._mine(losses, visit, at_once)
        if recording and not at_once:
            scored = None if scores is None or groups is None else (scores.detach(), groups)
            self._held = HeldVisit(visit, scored, self._scaler, current_scale(self._scaler))
        self.last = FairLossState(
            losses, weights, self.fairness.last if self.fairness is not None else None
        )
        return self._combine(base, terms, weights, fairness)

    def follow(self, scaler: Any) -> None:
        """Record each visit once its step is over, and not at all where the scaler skips the step.

        The visit waits for the next call, `settle`, `end_epoch` or ``state_dict``; by then the
        scaler must have been updated. A step counts as skipped where the scaler's scale has fallen.

        Args:
            scaler: a `torch.amp.GradScaler`, or None to record at once.
        """
        following = scaler is not None and scaler.is_enabled()
        self.settle()
        self._scaler = scaler if following else None

    def settle(self) -> None:
        """Record the visit that waits for its step, if there is one and the step was made."""
        held, self._held = self._held, None
        if held is None:
            return
        kept = held.kept()
        if held.visit is not None and self.miner is not None:
            losses, ids = held.visit
            self.miner(losses.masked_fill(~kept.to(losses.device), torch.nan), ids, record=True)
            if self.mining_unit == "batch":
                self.batch_position.add_(kept.to(self.batch_position))
        if held.scored is not None and self.fairness is not None:
            scores, groups = held.scored
            kept = kept.to(scores.device)
            self.fairness.remember(scores, groups, valid=torch.isfinite(scores) & kept)

    def end_epoch(self) -> EpochSummary | None:
        """Refresh the miner's statistics and flags; return its summary, None without a miner."""
        self.settle()
        self.batch_position.zero_()
        return None if self.miner is None else self.miner.end_epoch()

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return (
            f"fairness_weight={self.fairness_weight}, score={self.score!r}, "
            f"normalization={self.normalization!r}, mining_unit={self.mining_unit!r}"
        )

    def _metadata(
        self,
        pair_ids: Tensor | None,
        groups: Tensor | Mapping[str, Tensor] | None,
        model_out: dict[str, Any],
        recording: bool,
    ) -> tuple[Tensor | None, Tensor | Mapping[str, Tensor] | None]:
        """Return the ids and groups of all processes that miner and fairness use.

        What is wrong with them is refused before anything is recorded.
        """
        by_pair = self.miner is not None and self.mining_unit == "pair"
        pair_ids = pair_ids if by_pair else None
        groups = groups if self.fairness is not None else None
        missing = None
        if by_pair and pair_ids is None and recording:
            missing = "the miner needs pair_ids (B,), got None"
        elif self.fairness is not None and groups is None:
            missing = "the fairness term needs groups (B,), (B, C) or name -> (B,), got None"
        if self.processes.world_size > 1:
            check = self.miner.check if isinstance(self.miner, BadPairMiner) else None
            metadata = LocalMetadata.of(model_out, pair_ids, groups, recording, missing, check)
            if metadata.device.type == "cpu" or not self._agreed:
                self.processes.agree(metadata.refusal, metadata.layout, metadata.device)
                self._agreed = True
            missing = metadata.refusal
        if missing is not None:
            raise ValueError(missing)
        if self.processes.world_size > 1:
            return metadata.gather(self.processes)
        return pair_ids, groups

    def _is_local(self, values: Tensor, model_out: dict[str, Any]) -> bool:
        """Whether values are of this process's pairs alone, not of all processes'."""
        several = self.processes.world_size > 1
        return several and values.shape[0] == model_out["image_features"].shape[0]

    def _of_all_processes(self, values: Tensor, model_out: dict[str, Any]) -> Tensor:
        return self.processes.gather(values) if self._is_local(values, model_out) else values

    def _visit(self, losses: Tensor, pair_ids: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Return the losses and ids that the miner is given, None where it is given none."""
        if self.miner is None:
            return None
        if self.mining_unit == "batch":
            if losses.device != self.batch_position.device:
                with torch.inference_mode(False):
                    self.to(losses.device)
            # In evaluation the batch recorded last is seen again: there may be none after it.
            position = self.batch_position if self.training else self.batch_position - 1
            return losses.mean()[None], position.clamp(min=0).clone()[None]
        return None if pair_ids is None else (losses, pair_ids)

    def _mine(self, losses: Tensor, visit: tuple[Tensor, Tensor] | None, recording: bool) -> Tensor:
        """Return the weights of all processes' pairs."""
        if self.miner is None or visit is None:
            return torch.ones_like(losses)
        weights: Tensor = self.miner(*visit, record=recording)
        if self.mining_unit == "batch":
            if recording:
                self.batch_position.add_(1)
            weights = weights.expand_as(losses)
        return weights

    def _fairness(
        self,
        scores: Tensor | None,
        groups: Tensor | Mapping[str, Tensor] | None,
        recording: bool,
    ) -> Tensor | None:
        if self.fairness is None or scores is None or groups is None:
            return None
        term: Tensor = self.fairness(scores, groups, valid=torch.isfinite(scores), record=recording)
        # Weight 0 leaves no trace: 0 times a term that overflowed would be NaN.
        return self.fairness_weight * term if self.fairness_weight else torch.zeros_like(term)

    def _counts_once(self) -> bool:
        """Whether the processes' gradients of the base loss average to the global batch's.

        With neither ``local_loss`` nor ``gather_with_grad`` open_clip's average is 1/W of it; the
        fairness term keeps its proportion to the base loss.
        """
        base = self.base_loss
        return bool(getattr(base, "local_loss", True) or getattr(base, "gather_with_grad", True))

    def _spread(self, values: Tensor, model_out: dict[str, Any]) -> Tensor:
        """Return the values of all processes' pairs, live; the base loss decides by how much."""
        if not self._is_local(values, model_out):
            return values
        values = self.processes.gather_live(values)
        return self.processes.averaged(values) if self._counts_once() else values

    def _scores(self, terms: PairTerms, model_out: dict[str, Any]) -> Tensor:
        """Return the scores of all processes' pairs."""
        if self.score == "loss":
            return self._spread(terms.contrastive, model_out)
        names = ("image_features", "text_features", "logit_scale")
        missing = [name for name in names if name not in model_out]
        if missing:
            raise ValueError(
                f"score={self.score!r} needs {', '.join(missing)} in the model's output, "
                f"got {sorted(model_out)}"
            )
        image, text, scale = (model_out[name] for name in names)
        bias = model_out.get("logit_bias")
        if self.score == "official":
            return official_scores(pair_logits(image, text, scale, bias))
        if self.processes.world_size == 1:
            return pair_similarities(image, text, scale, bias)
        # The scale and the bias are every process's own: their gradient is whole in each.
        cosines = self._spread(pair_similarities(image, text, 1.0), model_out)
        scores: Tensor = scale * cosines
        return scores if bias is None else scores + bias

    def _weights_of(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return the weights of the pairs that values are of: all processes' or this one's."""
        if values.shape == weights.shape:
            return weights
        return weights[self.processes.own(values.shape[0])]

    def _combine(
        self, base: Any, terms: PairTerms, weights: Tensor, fairness: Tensor | None
    ) -> Any:
        weights = normalized_weights(weights, self.normalization)
        changes = {
            name: reweighting(values, self._weights_of(values, weights))
            for name, values in terms.named.items()
        }
        return changed(base, changes, fairness)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self._held = None
        super()._load_from_state_dict(*args, **options)
