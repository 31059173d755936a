"""`SinkhornFairnessLoss`: how far each group's scores lie from the batch's, as a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..functional import Detach, FairnessTerms, GroupReduction, group_membership
from ..functional.fairness import FairnessOptions, check_codes, check_scores, fairness_terms
from ..state import StatefulModule
from ..validation import check_integer, is_number, should_validate


class SinkhornFairnessLoss(FairnessOptions, StatefulModule):
    r"""Distance between each protected group's score distribution and the whole batch's.

    The module form of `fairclip_losses.functional.sinkhorn_fairness`, with an optional queue. Its
    defaults are the preset ``aligned``; the published constants are in ``paper`` and ``official``.

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
        group_reduction: ``"mean"`` over the groups present, as above, or ``"sum"`` (published;
            attributes with more groups then weigh more).
        min_group_size: groups of less mass in the batch (and queue) add 0; a member has mass 1, or
            its weight.
        queue_size: recent scores remembered for the batch and for each group, so that a rare group
            has a distribution at all; 0 is none. Needs ``num_groups``. Queued scores and weights
            are detached and float32, whatever the module is cast to, and are part of the state
            dict.
        detach: ``"none"``, ``"groups"`` or ``"total"``: the side that gets no gradient.
        divide_by_group_sum: divide each group's scores by their sum and the batch's by nothing:
            what the published code computes, for comparison only.
        validate: look at values (finite scores, codes in range); None looks on the CPU only,
            outside torch.compile.

    After each call `last` holds the detached `FairnessTerms` (per attribute, per group, counts).

    Raises:
        ValueError: options out of range, and in ``forward`` what `sinkhorn_fairness` refuses or a
            group code >= num_groups or < -1.

    Source: Bansal et al. (arXiv:2505.03153); FairCLIP (arXiv:2403.19949).
    """

    queue: Tensor
    queue_weights: Tensor
    queue_next: Tensor

    def __init__(
        self,
        *,
        p: int = 1,
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
        StatefulModule.__init__(self)
        FairnessOptions.__init__(
            self, p, blur, group_reduction, min_group_size, detach, divide_by_group_sum
        )
        self.queue_size = check_integer("queue_size", queue_size, 0)
        if queue_size and num_groups is None:
            raise ValueError(
                f"a queue needs num_groups, got queue_size={queue_size} and num_groups=None"
            )
        self.validate = validate
        self.attribute_names, self.num_groups = _name_groups(num_groups)
        self.attribute_weights = _checked_weights(attribute_weights)
        if self.num_groups and (self.attribute_names or not isinstance(attribute_weights, Mapping)):
            _in_order(self.attribute_weights, self.attribute_names, len(self.num_groups))
        rows = 1 + sum(self.num_groups or ()) if queue_size else 0
        # float32 whatever the default dtype is
        empty = torch.full((rows, queue_size), float("nan"), dtype=torch.float32)
        self.register_state("queue", empty)
        self.register_state("queue_weights", torch.zeros_like(empty))
        self.register_state("queue_next", torch.zeros(rows, dtype=torch.int64))
        self.last: FairnessTerms | None = None

    def forward(
        self,
        scores: Tensor,
        groups: Tensor | Mapping[str, Tensor],
        *,
        weights: Tensor | None = None,
        valid: Tensor | None = None,
        record: bool | None = None,
    ) -> Tensor:
        """Return the fairness term, (): float64 for float64 scores, else float32.

        Args:
            scores: (B,), floating point.
            groups: LongTensor (B,), (B, C), or name -> (B,); -1 is unknown.
            weights: (B,) floating point, finite and >= 0: the mass of each score in the batch's
                distribution and in its groups'; None is 1 each. They get no gradient.
            valid: (B,) bool, the scores that count; None is all.
            record: put the scores into the queue; None does so in training mode. One that is not
                finite (in float32) never enters it.
        """
        check_scores(scores, weights, valid, self.validate)
        names, codes, num_groups = self._codes(groups, scores)
        if scores.device != self.queue.device:
            with torch.inference_mode(False):
                self.to(scores.device)
        of_attributes = _in_order(self.attribute_weights, names, codes.shape[1])
        queue = (self.queue, self.queue_weights) if self.queue_size else (None, None)
        terms = fairness_terms(
            scores, codes, num_groups, self, of_attributes, weights, valid, *queue
        )
        if self.queue_size and (self.training if record is None else record):
            self._enqueue(scores.detach(), codes, num_groups, weights, valid)
        self.last = FairnessTerms(*(part.detach() for part in terms))
        return terms.total

    def remember(
        self,
        scores: Tensor,
        groups: Tensor | Mapping[str, Tensor],
        *,
        weights: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> None:
        """Put scores into the queue that ``forward`` has compared without recording them."""
        if self.queue_size:
            _, codes, num_groups = self._codes(groups, scores)
            self._enqueue(scores.detach(), codes, num_groups, weights, valid)

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return (
            f"p={self.p}, blur={self.blur}, num_groups={self.num_groups}, "
            f"queue_size={self.queue_size}"
        )

    def _codes(
        self, groups: Tensor | Mapping[str, Tensor], scores: Tensor
    ) -> tuple[tuple[str, ...], Tensor, tuple[int, ...]]:
        """Return the attributes' names, the codes (B, C) beside the scores, the groups' numbers."""
        names, given = self.attribute_names, self.num_groups
        if isinstance(groups, Mapping):
            if names and set(groups) != set(names):
                raise ValueError(
                    f"groups must name the attributes {list(names)}, got {list(groups)}"
                )
            names = names or tuple(groups)
            groups = {name: groups[name] for name in names}
        codes = check_codes(groups, scores)
        if given is not None and codes.shape[1] != len(given):
            raise ValueError(f"expected codes of {len(given)} attributes, got {codes.shape[1]}")
        if codes.numel() == 0:
            return names, codes, given or (1,) * codes.shape[1]
        if given is not None and not should_validate(codes, self.validate):
            return names, codes, given
        low, high = (ends.tolist() for ends in torch.aminmax(codes, dim=0))
        counts = given or tuple(max(top + 1, 1) for top in high)
        if min(low) < -1 or any(top >= count for top, count in zip(high, counts, strict=True)):
            _refuse_codes(codes, names, given)
        return names, codes, counts

    def _enqueue(
        self,
        scores: Tensor,
        codes: Tensor,
        num_groups: tuple[int, ...],
        weights: Tensor | None,
        valid: Tensor | None,
    ) -> None:
        """Write each row's newest scores over its oldest, without reading anything back."""
        scores = scores.to(self.queue.dtype)
        weights = torch.ones_like(scores) if weights is None else weights.detach().to(scores.dtype)
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
        for queue, newest in ((self.queue, scores), (self.queue_weights, weights)):
            widened = torch.nn.functional.pad(queue, (0, 1))
            widened.scatter_(1, slot, newest.expand(slot.shape))
            queue.copy_(widened[:, :-1])
        self.queue_next.copy_((self.queue_next + count[:, 0]) % self.queue_size)


def _refuse_codes(
    codes: Tensor, names: tuple[str, ...], num_groups: tuple[int, ...] | None
) -> None:
    """Say which code (B, C) of which attribute is wrong, the first of those that are."""
    wrong = codes < -1
    if num_groups is not None:
        wrong |= codes >= torch.tensor(num_groups, device=codes.device)
    row, column = wrong.nonzero()[0].tolist()
    expected = "must be -1 (unknown) or more"
    if num_groups is not None:
        count = num_groups[column]
        groups = f"{count} group{'s' if count > 1 else ''}"
        expected = f"must lie in -1..{count - 1} ({groups}; -1 is unknown)"
    raise ValueError(
        f"attribute {repr(names[column]) if names else column}: group codes {expected}, "
        f"got {int(codes[row, column])} at position {row}"
    )


def _name_groups(
    num_groups: int | Sequence[int] | Mapping[str, int] | None,
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Return the attributes' names, if they have any, and the number of groups of each."""
    if num_groups is None:
        return (), None
    names = tuple(num_groups) if isinstance(num_groups, Mapping) else ()
    counts: Any = list(num_groups.values()) if isinstance(num_groups, Mapping) else num_groups
    given = tuple(counts) if isinstance(counts, Sequence) else (counts,)
    if not given or any(isinstance(n, bool) or not isinstance(n, Integral) or n < 1 for n in given):
        raise ValueError(f"num_groups must be integers >= 1, got {num_groups!r}")
    return names, tuple(int(n) for n in given)


def _checked_weights(
    weights: Sequence[float] | Mapping[str, float] | None,
) -> tuple[float, ...] | dict[str, float] | None:
    if weights is None:
        return None
    if not isinstance(weights, Iterable):
        raise ValueError(
            "attribute_weights must be a sequence or a mapping name -> weight, "
            f"got {type(weights).__name__}"
        )
    values = tuple(weights.values()) if isinstance(weights, Mapping) else tuple(weights)
    if any(not is_number(w) or not 0 <= w < float("inf") for w in values):
        raise ValueError(f"attribute_weights must be finite and >= 0, got {weights!r}")
    return dict(weights) if isinstance(weights, Mapping) else values


def _in_order(
    weights: tuple[float, ...] | dict[str, float] | None, names: tuple[str, ...], count: int
) -> tuple[float, ...] | None:
    """Return the weights in the order of the attributes."""
    if isinstance(weights, dict):
        if set(weights) != set(names):
            raise ValueError(
                f"attribute_weights names {list(weights)}, the groups are {list(names)}"
            )
        weights = tuple(weights[name] for name in names)
    if weights is not None and len(weights) != count:
        raise ValueError(f"attribute_weights has {len(weights)} entries for {count} attributes")
    return weights
