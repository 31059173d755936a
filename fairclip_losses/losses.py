"""The fairness term as a module, and `FairLoss`: mining and fairness round a CLIP loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .distributed import Processes
from .functional import (
    Detach,
    FairnessTerms,
    GroupReduction,
    Normalization,
    group_membership,
    normalized_weights,
    official_scores,
    pair_logits,
    pair_similarities,
    reweighting,
    sinkhorn_fairness,
    stack_groups,
)
from .functional.fairness import check_options, check_scores
from .ops.checks import should_validate
from .pair_terms import PairTerms, pair_terms

if TYPE_CHECKING:
    from .miners import BadPairMiner, EpochSummary

Score = Literal["loss", "similarity", "official"]
MiningUnit = Literal["pair", "batch"]


class SinkhornFairnessLoss(nn.Module):
    r"""Distance between each protected group's score distribution and the whole batch's.

    The module form of `fairclip_losses.functional.sinkhorn_fairness`, with an optional queue.

    .. math::
        F = \sum_c w_c \frac{1}{|G_c|} \sum_{g \in G_c} S_\varepsilon(D_{batch}, D_g)

    Args:
        p: 1 or 2, the power of the cost ``|x - y|^p / p``.
        blur: length scale of the Sinkhorn divergence, in units of the scores; 0 (the default, and
            the fastest) is the exact distance on the line.
        num_groups: number of groups of each attribute: an int for one attribute, a sequence, or a
            mapping name -> int. None reads it off each batch, which on an accelerator waits for the
            device once a call: pass it in training.
        attribute_weights: w_c in the attributes' order, or name -> weight; default 1/C each.
        group_reduction: ``"mean"`` over the groups present or ``"sum"``.
        min_group_size: groups with fewer members in the batch (and queue) add 0.
        queue_size: recent scores remembered for the batch and for each group, so that a rare group
            has a distribution at all; 0 is none. Needs ``num_groups``. Queued scores are detached,
            and are part of the state dict.
        detach: ``"none"``, ``"groups"`` or ``"total"``: the side that gets no gradient.
        divide_by_group_sum: the published code's scaling, for comparison only.
        validate: look at values (finite scores, codes in range); None looks on the CPU only.

    After each call `last` holds the detached `FairnessTerms` (per attribute, per group, counts).

    Raises:
        ValueError: options out of range, and in ``forward`` what `sinkhorn_fairness` refuses or a
            group code >= num_groups or < -1.

    Source: Bansal et al. (arXiv:2505.03153); FairCLIP (arXiv:2403.19949).
    """

    queue: Tensor
    queue_next: Tensor

    def __init__(
        self,
        *,
        p: int = 2,
        blur: float = 0.0,
        num_groups: int | Sequence[int] | Mapping[str, int] | None = None,
        attribute_weights: Sequence[float] | Mapping[str, float] | None = None,
        group_reduction: GroupReduction = "mean",
        min_group_size: int = 2,
        queue_size: int = 0,
        detach: Detach = "none",
        divide_by_group_sum: bool = False,
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        if p not in (1, 2):
            raise ValueError(f"p must be 1 or 2, got {p!r}")
        if not 0 <= blur < float("inf"):
            raise ValueError(f"blur must be a finite number >= 0, got {blur!r}")
        check_options(group_reduction, detach, min_group_size)
        if queue_size < 0 or (queue_size and num_groups is None):
            raise ValueError(f"queue_size must be >= 0 and needs num_groups, got {queue_size!r}")
        self.p = p
        self.blur = float(blur)
        self.group_reduction: GroupReduction = group_reduction
        self.min_group_size = min_group_size
        self.queue_size = queue_size
        self.detach: Detach = detach
        self.divide_by_group_sum = divide_by_group_sum
        self.validate = validate
        self.attribute_names, self.num_groups = _name_groups(num_groups)
        self.attribute_weights = _order_weights(
            attribute_weights, self.attribute_names, self.num_groups
        )
        rows = 1 + sum(self.num_groups or ()) if queue_size else 0
        self.register_buffer("queue", torch.full((rows, queue_size), float("nan")))
        self.register_buffer("queue_next", torch.zeros(rows, dtype=torch.int64))
        self.last: FairnessTerms | None = None

    def forward(
        self,
        scores: Tensor,
        groups: Tensor | Mapping[str, Tensor],
        *,
        valid: Tensor | None = None,
        record: bool | None = None,
    ) -> Tensor:
        """Return the scalar fairness term.

        Args:
            scores: (B,), floating point.
            groups: LongTensor (B,), (B, C), or name -> (B,); -1 is unknown.
            valid: (B,) bool, the scores that count; None is all.
            record: put the scores into the queue; None does so in training mode. One that is not
                finite (in float32) never enters it.

        Returns:
            (), float64 for float64 scores, else float32.
        """
        check_scores(scores)
        names, codes = self._codes(groups)
        num_groups = self._num_groups(codes)
        codes = codes.to(scores.device, non_blocking=scores.device.type == "cuda")
        if scores.device != self.queue.device:
            with torch.inference_mode(False):
                self.to(scores.device)
        terms = sinkhorn_fairness(
            scores,
            codes,
            num_groups,
            p=self.p,
            blur=self.blur,
            attribute_weights=self._weights(names, codes.shape[1]),
            group_reduction=self.group_reduction,
            min_group_size=self.min_group_size,
            detach=self.detach,
            divide_by_group_sum=self.divide_by_group_sum,
            valid=valid,
            queue=self.queue if self.queue_size else None,
            validate=self.validate,
        )
        if self.queue_size and (self.training if record is None else record):
            self._enqueue(scores.detach(), codes, num_groups, valid)
        self.last = FairnessTerms(*(part.detach() for part in terms))
        return terms.total

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return (
            f"p={self.p}, blur={self.blur}, num_groups={self.num_groups}, "
            f"queue_size={self.queue_size}"
        )

    def _codes(self, groups: Tensor | Mapping[str, Tensor]) -> tuple[tuple[str, ...], Tensor]:
        if not isinstance(groups, Mapping):
            return self.attribute_names, stack_groups(groups)
        if self.attribute_names:
            if set(groups) != set(self.attribute_names):
                raise ValueError(
                    f"groups must name the attributes {list(self.attribute_names)}, "
                    f"got {list(groups)}"
                )
            groups = {name: groups[name] for name in self.attribute_names}
        return tuple(groups), stack_groups(groups)

    def _num_groups(self, codes: Tensor) -> tuple[int, ...]:
        look = should_validate(codes, self.validate) and codes.numel() > 0
        if self.num_groups is None:
            if codes.numel() == 0:
                return (1,) * codes.shape[1]
            if bool((codes < -1).any()):
                raise ValueError(f"group codes must be >= -1, got {int(codes.min())}")
            return tuple(max(int(top) + 1, 1) for top in codes.amax(0).tolist())
        if codes.shape[1] != len(self.num_groups):
            raise ValueError(
                f"expected codes of {len(self.num_groups)} attributes, got {codes.shape[1]}"
            )
        if look:
            top = torch.tensor(self.num_groups, device=codes.device)
            if bool(((codes < -1) | (codes >= top)).any()):
                raise ValueError(
                    f"group codes must lie in -1..G-1 with G = {self.num_groups}, "
                    f"got {codes.amin(0).tolist()}..{codes.amax(0).tolist()}"
                )
        return self.num_groups

    def _weights(self, names: tuple[str, ...], count: int) -> tuple[float, ...] | None:
        given = self.attribute_weights
        # A mapping is still one where no names were known before this batch.
        if isinstance(given, dict) and set(given) != set(names):
            raise ValueError(f"attribute_weights names {list(given)}, the groups are {list(names)}")
        weights = tuple(given[name] for name in names) if isinstance(given, dict) else given
        if weights is not None and len(weights) != count:
            raise ValueError(f"attribute_weights has {len(weights)} entries for {count} attributes")
        return weights

    def _enqueue(
        self, scores: Tensor, codes: Tensor, num_groups: tuple[int, ...], valid: Tensor | None
    ) -> None:
        """Write each row's newest scores over its oldest, without reading anything back."""
        scores = scores.to(self.queue.dtype)
        members = group_membership(codes, num_groups)
        members = torch.cat([torch.ones_like(members[:1]), members]) & torch.isfinite(scores)
        if valid is not None:
            members = members & valid
        rank = members.cumsum(1)
        count = members.sum(1, keepdim=True)
        kept = members & (rank > count - self.queue_size)
        slot = (self.queue_next[:, None] + rank - 1) % self.queue_size
        # What is not kept goes to a column past the end, which is cut off again.
        slot = torch.where(kept, slot, self.queue_size)
        widened = torch.nn.functional.pad(self.queue, (0, 1))
        widened.scatter_(1, slot, scores.expand(slot.shape))
        self.queue.copy_(widened[:, :-1])
        self.queue_next.copy_((self.queue_next + count[:, 0]) % self.queue_size)


def _name_groups(
    num_groups: int | Sequence[int] | Mapping[str, int] | None,
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    if num_groups is None:
        return (), None
    names: tuple[str, ...] = ()
    if isinstance(num_groups, Mapping):
        names, given = tuple(num_groups), tuple(num_groups.values())
    else:
        given = tuple(num_groups) if isinstance(num_groups, Sequence) else (num_groups,)
    if not given or any(isinstance(n, bool) or not isinstance(n, Integral) or n < 1 for n in given):
        raise ValueError(f"num_groups must be integers >= 1, got {num_groups!r}")
    return names, tuple(int(n) for n in given)


def _order_weights(
    weights: Sequence[float] | Mapping[str, float] | None,
    names: tuple[str, ...],
    num_groups: tuple[int, ...] | None,
) -> tuple[float, ...] | dict[str, float] | None:
    """Return the weights in the attributes' order, or as they are while no names are known."""
    if weights is None:
        return None
    values = tuple(weights.values()) if isinstance(weights, Mapping) else tuple(weights)
    if any(not 0 <= w < float("inf") for w in values):
        raise ValueError(f"attribute_weights must be finite and >= 0, got {weights!r}")
    if isinstance(weights, Mapping):
        if not names:
            return dict(weights)
        if set(weights) != set(names):
            raise ValueError(f"attribute_weights must name {list(names)}, got {list(weights)}")
        return tuple(weights[name] for name in names)
    if num_groups is not None and len(values) != len(num_groups):
        raise ValueError(
            f"attribute_weights must have {len(num_groups)} entries, got {len(values)}"
        )
    return values


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
        base_loss: open_clip's ClipLoss, SigLipLoss, CoCaLoss or DistillClipLoss, in one process or
            several, or any module with a method ``pair_terms(**model_out)``, in one process; see
            `fairclip_losses.pair_terms`.
            Without miner and fairness any module will do.
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
    ``record`` (None: record the visit in training mode; False: only read, as for the 2nd and later
    passes over one accumulated batch). It returns what ``base_loss`` returns; in dict form
    (``output_dict=True``) the fairness term is the entry ``fairness_loss``, otherwise it is added
    to the first term. Where miner and fairness are None, or nothing is flagged and the weight is 0,
    the result equals the base loss bit for bit. Scores that are not finite take no part in the
    fairness term and are not recorded; the base loss then is what it is without this module.

    Over several processes (a base loss with ``world_size`` > 1) each process passes its own pairs,
    as many as every other; mining and fairness see the global batch, every process keeps the
    same memory, and gradients averaged over processes are those of one process on that batch where
    the base loss's are (``gather_with_grad``).

    Call `end_epoch` after each epoch. `last` holds the last call's `FairLossState`.

    Raises:
        ValueError: options out of range; in ``forward`` a base
            loss whose per-pair terms are not known or do not fit what it returns, missing ids or
            groups, and what miner and fairness refuse.

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
        if not 0 <= fairness_weight < float("inf"):
            raise ValueError(f"fairness_weight must be finite and >= 0, got {fairness_weight!r}")
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
        self.fairness_weight = float(fairness_weight)
        self.score: Score = score
        self.normalization: Normalization = normalization
        self.mining_unit: MiningUnit = mining_unit
        self.register_buffer("batch_position", torch.zeros((), dtype=torch.int64))
        self.last: FairLossState | None = None
        parameters = inspect.signature(base_loss.forward).parameters.values()
        self._base_positional = [
            parameter.name
            for parameter in parameters
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]
        self._base_takes_output_dict = any(
            parameter.name == "output_dict" or parameter.kind is inspect.Parameter.VAR_KEYWORD
            for parameter in parameters
        )

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
        model_out = self._by_name(args, model_out)
        output_dict = model_out.pop("output_dict", output_dict)
        if self.miner is None and self.fairness is None:
            return self._base(model_out, output_dict)
        recording = self.training if record is None else record
        self._check_metadata(pair_ids, groups, recording)
        terms = pair_terms(self.base_loss, model_out)
        base = self._base(model_out, output_dict)
        losses = self._of_all_processes(terms.contrastive.detach(), model_out)
        weights = self._mine(losses, pair_ids, recording)
        fairness = self._fairness(terms, groups, model_out, recording)
        self.last = FairLossState(
            losses, weights, self.fairness.last if self.fairness is not None else None
        )
        return self._combine(base, terms, weights, fairness)

    def end_epoch(self) -> EpochSummary | None:
        """Refresh the miner's statistics and flags; return its summary, None without a miner."""
        self.batch_position.zero_()
        return None if self.miner is None else self.miner.end_epoch()

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return (
            f"fairness_weight={self.fairness_weight}, score={self.score!r}, "
            f"normalization={self.normalization!r}, mining_unit={self.mining_unit!r}"
        )

    def _by_name(self, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """Return all that was passed for the base loss by the names of its parameters."""
        names = self._base_positional
        if len(args) > len(names):
            raise ValueError(
                f"expected at most {len(names)} positional arguments ({', '.join(names)}), "
                f"got {len(args)}"
            )
        twice = [name for name in names[: len(args)] if name in named]
        if twice:
            raise ValueError(f"expected {', '.join(twice)} once, got it by position and by name")
        return {**dict(zip(names, args, strict=False)), **named}

    def _base(self, model_out: dict[str, Any], output_dict: bool) -> Any:
        if self._base_takes_output_dict:
            return self.base_loss(**model_out, output_dict=output_dict)
        if output_dict:
            raise ValueError(
                "output_dict=True needs a base loss that takes it, "
                f"got {type(self.base_loss).__name__}"
            )
        return self.base_loss(**model_out)

    def _check_metadata(
        self,
        pair_ids: Tensor | None,
        groups: Tensor | Mapping[str, Tensor] | None,
        recording: bool,
    ) -> None:
        """Refuse a call that lacks ids or groups before anything is recorded."""
        by_pair = self.miner is not None and self.mining_unit == "pair"
        if by_pair and pair_ids is None and recording:
            raise ValueError("the miner needs pair_ids (B,), got None")
        if self.fairness is not None and groups is None:
            raise ValueError(
                "the fairness term needs groups (B,), (B, C) or name -> (B,), got None"
            )

    def _is_local(self, values: Tensor, model_out: dict[str, Any]) -> bool:
        """Whether values are of this process's pairs alone, not of all processes'."""
        several = self.processes.world_size > 1
        return several and values.shape[0] == model_out["image_features"].shape[0]

    def _of_all_processes(self, values: Tensor, model_out: dict[str, Any]) -> Tensor:
        return self.processes.gather(values) if self._is_local(values, model_out) else values

    def _mine(self, losses: Tensor, pair_ids: Tensor | None, recording: bool) -> Tensor:
        """Return the weights of all processes' pairs; each process keeps the whole memory."""
        if self.miner is None:
            return torch.ones_like(losses)
        if self.mining_unit == "batch":
            if losses.device != self.batch_position.device:
                with torch.inference_mode(False):
                    self.to(losses.device)
            # A pass that only reads sees the batch recorded last again.
            position = self.batch_position
            position = position.clone() if recording else (position - 1).clamp(min=0)
            weight: Tensor = self.miner(losses.mean()[None], position[None], record=recording)
            if recording:
                self.batch_position.add_(1)
            return weight.expand_as(losses)
        if pair_ids is None:
            return torch.ones_like(losses)
        pair_ids = self.processes.gather(pair_ids.to(losses.device))
        weights: Tensor = self.miner(losses, pair_ids, record=recording)
        return weights

    def _fairness(
        self,
        terms: PairTerms,
        groups: Tensor | Mapping[str, Tensor] | None,
        model_out: dict[str, Any],
        recording: bool,
    ) -> Tensor | None:
        if self.fairness is None or groups is None:
            return None
        scores = self._scores(terms, model_out)
        processes = self.processes
        if processes.world_size > 1:
            if isinstance(groups, Mapping):
                groups = {k: processes.gather(v.to(scores.device)) for k, v in groups.items()}
            else:
                groups = processes.gather(groups.to(scores.device))
        local = self._is_local(scores, model_out)
        if local:
            scores = processes.gather_live(scores)
        term: Tensor = self.fairness(scores, groups, valid=torch.isfinite(scores), record=recording)
        if local and self._counts_once():
            term = processes.averaged(term)
        # Weight 0 leaves no trace: 0 times a term that overflowed would be NaN.
        return self.fairness_weight * term if self.fairness_weight else torch.zeros_like(term)

    def _counts_once(self) -> bool:
        """Whether the processes' gradients of the base loss average to the global batch's.

        With neither ``local_loss`` nor ``gather_with_grad`` open_clip's average is 1/W of it; the
        fairness term keeps its proportion to the base loss.
        """
        base = self.base_loss
        return bool(getattr(base, "local_loss", True) or getattr(base, "gather_with_grad", True))

    def _scores(self, terms: PairTerms, model_out: dict[str, Any]) -> Tensor:
        if self.score == "loss":
            return terms.contrastive
        names = ("image_features", "text_features", "logit_scale")
        missing = [name for name in names if name not in model_out]
        if missing:
            raise ValueError(
                f"score={self.score!r} needs {', '.join(missing)} in the model's output, "
                f"got {sorted(model_out)}"
            )
        image, text, scale = (model_out[name] for name in names)
        bias = model_out.get("logit_bias")
        if self.score == "similarity":
            return pair_similarities(image, text, scale, bias)
        return official_scores(pair_logits(image, text, scale, bias))

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
        if isinstance(base, dict):
            if not changes.keys() <= base.keys():
                raise ValueError(
                    f"pair_terms names {list(changes)}, but the base loss returned {list(base)}"
                )
            combined = {
                name: value + changes[name] if name in changes else value
                for name, value in base.items()
            }
            return combined if fairness is None else combined | {"fairness_loss": fairness}
        # Positional forms list the terms in the order of `terms.named`.
        parts = list(base) if isinstance(base, tuple) else [base]
        if len(parts) < len(changes):
            raise ValueError(
                f"pair_terms names {list(changes)}, but the base loss returned {len(parts)} terms"
            )
        for k, change in enumerate(changes.values()):
            parts[k] = parts[k] + change
        if fairness is not None:
            parts[0] = parts[0] + fairness
        return tuple(parts) if isinstance(base, tuple) else parts[0]
