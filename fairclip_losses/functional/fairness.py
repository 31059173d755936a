"""The fairness term as pure functions: how far each group's scores lie from the whole batch's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..ops import sinkhorn_divergence
from ..validation import all_at_least, check_integer, should_validate

GroupReduction = Literal["mean", "sum"]
Detach = Literal["none", "groups", "total"]


class FairnessTerms(NamedTuple):
    """The fairness term and what it is made of, R groups over C attributes."""

    total: Tensor  # () the term to add to a loss
    per_attribute: Tensor  # (C,)
    per_group: Tensor  # (R,) one divergence a group, 0 where the group is too small
    counts: Tensor  # (R,) members of each group, queued scores included


def stack_groups(groups: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Return group codes as one LongTensor (B, C) from (B,), (B, C) or a mapping name -> (B,).

    Raises:
        ValueError: what is no tensor or not of integers, codes that are not 1-D (2-D outside a
            mapping), no attribute at all, or attributes of different lengths.
    """
    if isinstance(groups, Mapping):
        if not groups:
            raise ValueError("groups must name at least one attribute, got an empty mapping")
        shapes = [_check_codes(codes).shape for codes in groups.values()]
        if any(len(shape) != 1 or shape != shapes[0] for shape in shapes):
            shown = {name: tuple(shape) for name, shape in zip(groups, shapes, strict=True)}
            raise ValueError(f"every attribute must have one shape (B,), got {shown}")
        return torch.stack([codes.long() for codes in groups.values()], dim=1)
    codes = _check_codes(groups)
    if codes.dim() not in (1, 2) or (codes.dim() == 2 and codes.shape[1] == 0):
        raise ValueError(f"groups must have shape (B,) or (B, C), C >= 1, got {tuple(codes.shape)}")
    return (codes[:, None] if codes.dim() == 1 else codes).long()


def _check_codes(codes: Tensor) -> Tensor:
    if not isinstance(codes, Tensor):
        raise ValueError(f"group codes must be a tensor, got {type(codes).__name__}")
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"group codes must be integers, got {codes.dtype}")
    return codes


def group_membership(groups: Tensor, num_groups: Sequence[int]) -> Tensor:
    """Return who belongs to which group: bool (R, B) for codes (B, C), R = sum(num_groups).

    Rows run through the groups of the first attribute, then of the second, and so on; a code
    outside 0..G-1 (such as -1, unknown) is in no row.
    """
    # Attribute by attribute: an index built on the host would have to wait for the device.
    rows = [
        codes == torch.arange(count, device=groups.device)[:, None]
        for codes, count in zip(groups.unbind(1), num_groups, strict=True)
    ]
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def sinkhorn_fairness(
    scores: Tensor,
    groups: Tensor | Mapping[str, Tensor],
    num_groups: Sequence[int],
    *,
    p: int = 2,
    blur: float = 0.0,
    attribute_weights: Sequence[float] | None = None,
    group_reduction: GroupReduction = "mean",
    min_group_size: int = 2,
    detach: Detach = "none",
    divide_by_group_sum: bool = False,
    valid: Tensor | None = None,
    queue: Tensor | None = None,
    validate: bool | None = None,
) -> FairnessTerms:
    r"""Return the Sinkhorn divergences between the scores of a batch and of each of its groups.

    .. math::
        F = \sum_c w_c \frac{1}{|G_c|} \sum_{g \in G_c} S_\varepsilon(D_{batch}, D_g)

    over the groups G_c of attribute c that have at least ``min_group_size`` members; an attribute
    without any adds 0. Both distributions are of the very same points, so gradients reach a score
    through its group and through the batch (see ``detach``).

    Args:
        scores: (B,), floating point: per-pair losses or similarities.
        groups: codes (B,), (B, C) or name -> (B,); -1 is unknown.
        num_groups: G_c of each attribute, in the attributes' order; a code outside 0..G_c-1 counts
            as unknown.
        p: see `sinkhorn_divergence`.
        blur: see `sinkhorn_divergence`; 0 is the exact distance.
        attribute_weights: w_c, default 1/C each.
        group_reduction: ``"mean"`` over the groups present, as above, or ``"sum"`` (published;
            attributes with more groups then weigh more).
        min_group_size: groups of fewer members add 0.
        detach: ``"groups"`` or ``"total"`` stops the gradient on that side.
        divide_by_group_sum: divide each group's scores by their sum and the batch's by nothing:
            what the published code computes, for comparison only.
        valid: (B,) bool, the scores that count at all; None is all of them.
        queue: recent detached scores, (1 + R, K), NaN where empty: row 0 of the whole batch, row
            1 + r of group r. They widen both distributions and get no gradient.
        validate: look at the scores for NaN and infinities; None looks on the CPU only, outside
            torch.compile.

    Returns:
        `FairnessTerms`; all but ``counts`` is connected to the graph of ``scores``, and float64 for
        float64 scores, else float32.

    Raises:
        ValueError: scores not (B,) floating point, NaN or infinite; groups of another length, not
            integer, or of another number of attributes than ``num_groups``; a valid, queue or
            attribute_weights of the wrong length; an option out of range.

    Source: Bansal et al. (arXiv:2505.03153), the fairness loss; Luo et al. (arXiv:2403.19949),
    eq. 3-4; averaged over groups instead of summed.
    """
    check_options(group_reduction, detach, min_group_size)
    check_scores(scores)
    codes = _check_groups(scores, groups, num_groups)
    if attribute_weights is not None and len(attribute_weights) != len(num_groups):
        raise ValueError(
            f"attribute_weights must have {len(num_groups)} entries, got {len(attribute_weights)}"
        )
    membership = group_membership(codes, num_groups)
    if valid is not None:
        _check_valid(valid, scores)
        membership = membership & valid
        scores = torch.where(valid, scores, 0.0)
    if should_validate(scores, validate):
        _check_finite(scores)
    points, total, members = scores, valid, membership
    if queue is not None:
        if queue.dim() != 2 or queue.shape[0] != 1 + len(membership):
            raise ValueError(
                f"queue must have shape ({1 + len(membership)}, K), got {tuple(queue.shape)}"
            )
        points, total, members = _with_queue(scores, valid, membership, queue)
    counts = members.sum(-1)
    large_enough = counts >= min_group_size
    weights = (members & large_enough[:, None]).to(torch.float32)
    whole = None if total is None else total.to(torch.float32)
    x = points[:, None]
    y = x
    if detach == "groups":
        y = x.detach()
    elif detach == "total":
        x = x.detach()
    if divide_by_group_sum:
        sums = (weights * y[:, 0]).sum(-1, keepdim=True)
        y = (y[:, 0] / torch.where(large_enough[:, None], sums, 1.0))[..., None]
    per_group = sinkhorn_divergence(x, y, whole, weights, p=p, blur=blur, validate=validate)
    return _reduce(per_group, large_enough, counts, num_groups, attribute_weights, group_reduction)


def check_options(group_reduction: str, detach: str, min_group_size: int) -> None:
    """Refuse options of the fairness term that are out of range with a ValueError."""
    if group_reduction not in ("mean", "sum"):
        raise ValueError(f"group_reduction must be 'mean' or 'sum', got {group_reduction!r}")
    if detach not in ("none", "groups", "total"):
        raise ValueError(f"detach must be 'none', 'groups' or 'total', got {detach!r}")
    check_integer("min_group_size", min_group_size, 1)


def check_scores(scores: Tensor) -> None:
    """Refuse scores that are not a floating point tensor (B,) with a ValueError."""
    if not isinstance(scores, Tensor):
        raise ValueError(f"scores must be a tensor, got {type(scores).__name__}")
    if scores.dim() != 1 or not scores.is_floating_point():
        raise ValueError(
            f"scores must be floating point of shape (B,), got {scores.dtype} {tuple(scores.shape)}"
        )


def _check_valid(valid: Tensor, scores: Tensor) -> None:
    if valid.dtype != torch.bool or valid.shape != scores.shape:
        raise ValueError(
            f"valid must be bool of shape {tuple(scores.shape)}, "
            f"got {valid.dtype} {tuple(valid.shape)}"
        )


def _check_finite(scores: Tensor) -> None:
    if all_at_least(scores, -math.inf):
        return
    bad = ~torch.isfinite(scores)
    raise ValueError(
        f"scores must be finite, got NaN or infinity at {int(bad.sum())} of {scores.numel()}"
    )


def _check_groups(
    scores: Tensor, groups: Tensor | Mapping[str, Tensor], num_groups: Sequence[int]
) -> Tensor:
    codes = stack_groups(groups)
    if codes.shape[0] != scores.shape[0]:
        raise ValueError(
            f"groups must have one row a score: {scores.shape[0]} scores, {codes.shape[0]} rows"
        )
    if codes.shape[1] != len(num_groups):
        raise ValueError(
            f"num_groups must count the groups of {codes.shape[1]} attributes, "
            f"got {tuple(num_groups)}"
        )
    if any(count < 1 for count in num_groups):
        raise ValueError(f"num_groups must be integers >= 1, got {tuple(num_groups)}")
    return codes.to(scores.device, non_blocking=scores.device.type == "cuda")


def _with_queue(
    scores: Tensor, valid: Tensor | None, membership: Tensor, queue: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Append the queued scores: row r of the queue belongs to measure r alone."""
    rows, length = queue.shape
    filled = ~queue.isnan()
    # Promoted: half precision scores meet a float32 queue.
    points = torch.cat([scores, torch.where(filled, queue.detach(), 0.0).flatten()])
    owner = torch.arange(rows, device=queue.device).repeat_interleave(length)
    queued = filled.flatten() & (owner == torch.arange(rows, device=queue.device)[:, None])
    whole = torch.ones_like(membership[:1]) if valid is None else valid[None]
    measures = torch.cat([torch.cat([whole, membership]), queued], dim=1)
    return points, measures[0], measures[1:]


def _reduce(
    per_group: Tensor,
    present: Tensor,
    counts: Tensor,
    num_groups: Sequence[int],
    attribute_weights: Sequence[float] | None,
    group_reduction: GroupReduction,
) -> FairnessTerms:
    def split(rows: Tensor) -> Sequence[Tensor]:  # a split costs more than all else here
        return torch.split(rows, list(num_groups)) if len(num_groups) > 1 else (rows,)

    per_attribute = []
    for divergences, there in zip(split(per_group), split(present), strict=True):
        value = divergences.sum()
        per_attribute.append(
            value / there.sum().clamp(min=1) if group_reduction == "mean" else value
        )
    stacked = torch.stack(per_attribute)
    if attribute_weights is None:
        total = stacked.mean()
    else:
        weighted = zip(attribute_weights, per_attribute, strict=True)
        total = torch.stack([weight * value for weight, value in weighted]).sum()
    return FairnessTerms(total, stacked, per_group, counts)


def official_scores(logits: Tensor) -> Tensor:
    """Return ``s_i = sum_k L_ik L_ki``, (B,), the diagonal of ``L_I L_T^T`` in the published code.

    It is quadratic in the logit scale and mixes the pairs of the batch; for comparison only.
    The logits are (B, B); the result is float32 or wider.
    Source: the code published with arXiv:2403.19949 and arXiv:2505.03153.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits * logits.t()).sum(1)
