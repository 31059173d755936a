"""`FairLoss`: bad pair mining and the fairness term around an existing image-text loss."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

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
    stack_groups,
    weighted_mean,
)
from ..miners import BadPairMiner, EpochSummary
from ..pair_terms import PairTerms, check_processes, pair_terms, trains_contrastive
from ..state import StatefulModule
from ..validation import check_choice, check_finite_number, check_integer, check_limit
from .sinkhorn_fairness import SinkhornFairnessLoss

Score = Literal["loss", "similarity", "official"]
MiningUnit = Literal["pair", "batch"]


class FairLossState(NamedTuple):
    """What the last call of `FairLoss` saw, detached."""

    pair_losses: Tensor  # (B,) raw, not re-weighted; of all processes, as the next two
    weights: Tensor  # (B,) of the miner, ones without one
    fairness: FairnessTerms | None


class FairLoss(StatefulModule):
    r"""Put bad pair mining and the fairness term around an existing image-text loss.

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
        fairness_start: epochs (calls of `end_epoch`) before the term trains; until then it is
            measured alone, since a term that trains before the bad pairs are known teaches them.
        fairness_limit: the most that the term may add to a pair's gradient, as a multiple of what
            the weighted base loss gives it, w_i / B: at 1 the term never turns a pair's gradient
            around, whatever its weight, so it cannot raise one loss to make groups alike. Infinity
            is no limit.
        weighted_fairness: give the miner's weights to the fairness term, so that a bad pair has as
            little mass in the distributions as it has in the loss.
        normalization: ``"batch"`` divides the weighted losses by B (published), ``"weights"`` by
            the sum of the weights.
        mining_unit: ``"pair"``, or ``"batch"``: the published code's unit, the batch's mean loss by
            its position in the epoch, for comparison only.

    ``forward`` takes what ``base_loss`` takes and besides ``pair_ids`` (B,) int64, ``groups``, and
    ``record`` (None: record the visit in training mode; False: only read, as for all but the last
    pass over one accumulated batch, so that every pass sees the same queue). In training the miner
    needs the ids and the fairness term the groups. In evaluation mode (``loss.eval()``), as in a
    validation loop, nothing is recorded and both may be missing: without ids every pair weighs 1,
    and without groups there is no fairness term, and no entry ``fairness_loss``.

    ``forward`` returns what ``base_loss`` returns; in dict form (``output_dict=True``) the fairness
    term is the entry ``fairness_loss``, otherwise it is added to the first term. Where miner and
    fairness are None the base loss is called, and the result is its own bit for bit. Otherwise the
    loss is computed once, from the per-pair terms, and ``base_loss.forward`` is not called; where
    all weights are 1 and the fairness weight is 0 it equals the base loss to rounding. Scores that
    are not finite take no part in the fairness term and are not recorded; the total then is not
    finite, as the base loss would be.

    In a process group of several, open_clip's losses must be built with its ``rank`` and
    ``world_size``. Each process passes its own pairs, as many as every other; mining and fairness
    see the global batch, every process keeps the same memory, and gradients averaged over processes
    are those of one process on that batch where the base loss's are (``gather_with_grad``).

    The defaults are the preset ``aligned``; the published constants are in the presets ``paper``
    and ``official`` (`build_fair_loss`).

    Call `end_epoch` after each epoch. `last` holds the last call's `FairLossState`.

    Raises:
        ValueError: a loss, miner or fairness that is no module, options out of range, or a miner
            around a CoCaLoss that does not train its contrastive loss; in ``forward`` a base loss
            whose per-pair terms are not known or not (B,), or that is built for other processes
            than there are, missing ids or groups, and what miner and fairness refuse. A batch that
            is refused is recorded nowhere, so that it can be repaired and passed again.

    Source: Bansal et al. (arXiv:2505.03153).
    """

    epoch: Tensor
    batch_position: Tensor

    def __init__(
        self,
        base_loss: nn.Module,
        miner: BadPairMiner | None = None,
        fairness: SinkhornFairnessLoss | None = None,
        fairness_weight: float = 0.1,
        score: Score = "loss",
        *,
        fairness_start: int = 0,
        fairness_limit: float = math.inf,
        weighted_fairness: bool = False,
        normalization: Normalization = "batch",
        mining_unit: MiningUnit = "pair",
    ) -> None:
        super().__init__()
        given = (base_loss, ""), (miner, " or None"), (fairness, " or None")
        for name, (part, optional) in zip(("base_loss", "miner", "fairness"), given, strict=True):
            if not (isinstance(part, nn.Module) or (optional and part is None)):
                raise ValueError(
                    f"{name} must be a torch.nn.Module{optional}, got {type(part).__name__}"
                )
        self.fairness_weight = check_finite_number("fairness_weight", fairness_weight)
        self.fairness_start = check_integer("fairness_start", fairness_start, 0)
        self.fairness_limit = check_limit("fairness_limit", fairness_limit)
        check_choice("score", score, ("loss", "similarity", "official"))
        check_choice("normalization", normalization, ("batch", "weights"))
        check_choice("mining_unit", mining_unit, ("pair", "batch"))
        if miner is not None and not trains_contrastive(base_loss):
            raise ValueError(
                f"the miner records the contrastive loss, which {type(base_loss).__name__} with "
                "clip_loss_weight=0 does not train: give it a weight, or leave the miner out"
            )
        self.base_loss = base_loss
        self.miner = miner
        self.fairness = fairness
        self.score: Score = score
        self.weighted_fairness = weighted_fairness
        self.normalization: Normalization = normalization
        self.mining_unit: MiningUnit = mining_unit
        self.register_state("epoch", torch.zeros((), dtype=torch.int64))
        self.register_state("batch_position", torch.zeros((), dtype=torch.int64))
        self.last: FairLossState | None = None
        self._check_score(Processes.of(base_loss))

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
        if args:  # by the names that they have in the base loss
            bound = inspect.signature(self.base_loss.forward).bind_partial(*args, **model_out)
            model_out = bound.arguments
            output_dict = model_out.pop("output_dict", output_dict)
        if self.miner is None and self.fairness is None:
            return self.base_loss(**model_out, **({"output_dict": True} if output_dict else {}))
        recording = self.training if record is None else record
        by_pair = self.miner is not None and self.mining_unit == "pair"
        if by_pair and pair_ids is None and recording:
            raise ValueError("the miner needs pair_ids (B,), got None")
        if self.fairness is not None and groups is None and (self.training or recording):
            raise ValueError(
                "the fairness term needs groups (B,), (B, C) or name -> (B,), got None"
            )
        processes = check_processes(self.base_loss)  # which may have learnt of them only now
        self._check_score(processes)
        batch = _Batch.of(self.base_loss, processes, model_out)
        pair_ids, groups = batch.gather_metadata(
            pair_ids if by_pair else None, groups if self.fairness is not None else None
        )
        terms = pair_terms(self.base_loss, model_out)
        losses = batch.gather(terms.contrastive.detach())
        # A batch that is refused is recorded nowhere: both parts look before either records.
        visits = self._visits(losses, pair_ids)
        weights = torch.ones_like(losses)
        if self.miner is not None and visits is not None:
            at_once = recording and self.fairness is None
            weights = self.miner(*visits, record=at_once).expand_as(losses)
        shares = normalized_weights(weights, self.normalization)
        parts = {
            name: weighted_mean(values, batch.of_same_pairs(shares, values))
            for name, values in terms.named.items()
        }
        term = last = None
        if self.fairness is not None and groups is not None:
            scores = self._scores(terms, model_out, batch)
            if self.fairness_limit < math.inf:
                scores = self._limit(scores, parts, shares)
            term = self._fairness_term(self.fairness, scores, groups, weights, recording)
            last = self.fairness.last
            if recording and self.miner is not None and visits is not None:
                self.miner(*visits, record=True)
        if recording and self.miner is not None and self.mining_unit == "batch":
            self.batch_position.add_(1)
        self.last = FairLossState(losses, weights, last)
        if output_dict:
            return parts if term is None else {**parts, "fairness_loss": term}
        first, *rest = parts.values()
        if term is not None:
            first = first + term
        return (first, *rest) if rest else first

    def end_epoch(self) -> EpochSummary | None:
        """Refresh the miner's statistics and flags; return its summary, None without a miner."""
        self.batch_position.zero_()
        self.epoch.add_(1)
        return None if self.miner is None else self.miner.end_epoch()

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return (
            f"fairness_weight={self.fairness_weight}, score={self.score!r}, "
            f"normalization={self.normalization!r}, mining_unit={self.mining_unit!r}"
        )

    def _check_score(self, processes: Processes) -> None:
        if self.score == "official" and processes.world_size > 1:
            raise ValueError(
                "score='official' is for comparisons in one process, got a base loss with "
                f"world_size={processes.world_size}"
            )

    def _visits(self, losses: Tensor, pair_ids: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Return the losses and ids that the miner is given, or None where it is given none."""
        if losses.device != self.epoch.device:
            with torch.inference_mode(False):
                self.to(losses.device)
        if self.miner is None or self.mining_unit == "pair":
            return None if pair_ids is None else (losses, pair_ids)
        # In evaluation the batch recorded last is seen again: there may be none after it.
        position = self.batch_position if self.training else self.batch_position - 1
        return losses.mean()[None], position.clamp(min=0).clone()[None]

    def _limit(self, scores: Tensor, parts: dict[str, Tensor], shares: Tensor) -> Tensor:
        """Return the scores, their gradient limited by the first part's, which is replaced."""
        base, *_ = parts
        most = self.fairness_limit * shares / len(shares)
        parts[base], scores = _LimitedGradient.apply(parts[base], scores, most)
        return scores

    def _fairness_term(
        self,
        fairness: SinkhornFairnessLoss,
        scores: Tensor,
        groups: Tensor | Mapping[str, Tensor],
        weights: Tensor,
        recording: bool,
    ) -> Tensor:
        """Return the fairness term as it is added to the loss: by its weight, from its start on."""
        given = {
            "valid": torch.isfinite(scores),
            "weights": weights if self.weighted_fairness else None,
        }
        term: Tensor = fairness(scores, groups, **given, record=False)
        if recording:
            fairness.remember(scores.detach(), groups, **given)
        # Weight 0 leaves no trace: 0 times a term that overflowed would be NaN.
        if self.fairness_weight == 0:
            return torch.zeros_like(term)
        term = self.fairness_weight * term
        if self.fairness_start:
            term = torch.where(self.epoch >= self.fairness_start, term, 0.0)
        return term

    def _scores(self, terms: PairTerms, model_out: dict[str, Any], batch: _Batch) -> Tensor:
        """Return the scores of all processes' pairs."""
        if self.score == "loss":
            return batch.gather_live(terms.contrastive)
        names = ("image_features", "text_features", "logit_scale")
        if missing := [name for name in names if name not in model_out]:
            raise ValueError(
                f"score={self.score!r} needs {', '.join(missing)} in the model's output, "
                f"got {sorted(model_out)}"
            )
        image, text, scale = (model_out[name] for name in names)
        bias = model_out.get("logit_bias")
        if self.score == "official":
            return official_scores(pair_logits(image, text, scale, bias))
        # The scale and the bias are every process's own: their gradient is whole in each.
        scores: Tensor = scale * batch.gather_live(pair_similarities(image, text, 1.0))
        return scores if bias is None else scores + bias


class _LimitedGradient(torch.autograd.Function):
    """Passes a base loss (), and scores (B,) whose gradient stays within ``most`` (B,) times its.

    By the gradient that the base loss itself is given, whatever scales both (a gradient scaler, a
    weight of the caller's) has no part in it. Where the base loss is given none, nothing is cut.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, scores: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(most)
        return base.view_as(base), scores.view_as(scores)

    @staticmethod
    def backward(
        ctx: Any, of_base: Tensor | None, of_scores: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        if of_base is not None and of_scores is not None:
            most = ctx.saved_tensors[0].to(of_scores.dtype) * of_base.abs()
            of_scores = of_scores.clamp(-most, most)
        return of_base, of_scores, None


class _Batch(NamedTuple):
    """Which pairs the values of a step are of: this process's, or those of all processes."""

    processes: Processes
    size: int  # pairs of this process; -1 where it is the only one
    device: torch.device | None
    # Whether the processes' gradients of the base loss average to the global batch's. With neither
    # local_loss nor gather_with_grad open_clip's average is 1/W of it; the fairness term keeps its
    # proportion to the base loss.
    counts_once: bool

    @classmethod
    def of(cls, loss: Any, processes: Processes, model_out: Mapping[str, Any]) -> _Batch:
        if processes.world_size == 1:
            return cls(processes, -1, None, True)
        image, text = (model_out.get(f"{side}_features") for side in ("image", "text"))
        if not isinstance(image, Tensor):
            raise ValueError(
                "several processes need image_features in the model's output, "
                f"got {sorted(model_out)}"
            )
        if isinstance(text, Tensor) and image.shape != text.shape:
            raise ValueError(
                "image_features and text_features must have one shape, "
                f"got {tuple(image.shape)} and {tuple(text.shape)}"
            )
        whole = getattr(loss, "local_loss", True) or getattr(loss, "gather_with_grad", True)
        return cls(processes, len(image), image.device, bool(whole))

    def gather(self, values: Tensor) -> Tensor:
        """Return the values of all processes' pairs, without gradients."""
        return self.processes.gather(values) if len(values) == self.size else values

    def gather_live(self, values: Tensor) -> Tensor:
        """Return the values of all processes' pairs, with the gradients of this one's."""
        if len(values) != self.size:
            return values
        return self.processes.gather_live(values, averaged=self.counts_once)

    def of_same_pairs(self, weights: Tensor, values: Tensor) -> Tensor:
        """Return the weights, of all processes' pairs, of the pairs that values are of."""
        return weights[self.processes.own(self.size)] if len(values) == self.size else weights

    def gather_metadata(
        self, pair_ids: Tensor | None, groups: Tensor | Mapping[str, Tensor] | None
    ) -> tuple[Tensor | None, Tensor | Mapping[str, Tensor] | None]:
        """Return the ids and groups of all processes' pairs, in one exchange."""
        if self.processes.world_size == 1 or (pair_ids is None and groups is None):
            return pair_ids, groups
        columns = []
        if pair_ids is not None:
            columns.append(self._column("pair_ids", pair_ids))
        if groups is not None:
            columns.extend(self._column("groups", stack_groups(groups)).unbind(1))
        gathered = self.processes.gather(torch.stack(columns, 1).to(self.device))
        if pair_ids is not None:
            pair_ids, gathered = gathered[:, 0], gathered[:, 1:]
        if isinstance(groups, Mapping):
            return pair_ids, dict(zip(groups, gathered.unbind(1), strict=True))
        return pair_ids, None if groups is None else gathered

    def _column(self, name: str, values: Tensor) -> Tensor:
        if not isinstance(values, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(values).__name__}")
        if values.shape[:1] != (self.size,):
            raise ValueError(
                f"{name} must have one row for each of the {self.size} pairs of this process, "
                f"got shape {tuple(values.shape)}"
            )
        if values.is_floating_point():
            raise ValueError(f"{name} must be integers (int64), got {values.dtype}")
        return values.to(torch.int64)
