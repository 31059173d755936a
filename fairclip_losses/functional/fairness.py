"""The fairness term as pure functions: how far each group's scores lie from the whole batch's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..ops.options import SinkhornOptions
from ..ops.sinkhorn import divergence
from ..validation import all_at_least, check_choice, check_integer, should_validate
from .pairs import widened

GroupReduction = Literal["mean", "sum"]
Detach = Literal["none", "groups", "total"]


class FairnessTerms(NamedTuple):
    """The fairness term and what it is made of, R groups over C attributes."""

    total: Tensor  # () the term to add to a loss
    per_attribute: Tensor  # (C,)
    per_group: Tensor  # (R,) one divergence a group, 0 where the group is too small
    counts: Tensor  # (R,) mass of each group: its members where all weigh 1, queued ones included


def stack_groups(groups: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Return group codes as one LongTensor (B, C) from (B,), (B, C) or a mapping name -> (B,).

    Raises:
        ValueError: what is no tensor or not of integers, codes that are not 1-D (2-D outside a
            mapping), no attribute at all, or attributes of different lengths.
    """
    columns = list(groups.values()) if isinstance(groups, Mapping) else [groups]
    for codes in columns:
        if not isinstance(codes, Tensor):
            raise ValueError(f"group codes must be a tensor, got {type(codes).__name__}")
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"group codes must be integers, got {codes.dtype}")
    if isinstance(groups, Mapping):
        if not groups:
            raise ValueError("groups must name at least one attribute, got an empty mapping")
        if any(codes.dim() != 1 or codes.shape != columns[0].shape for codes in columns):
            shown = {name: tuple(codes.shape) for name, codes in groups.items()}
            raise ValueError(f"every attribute must have one shape (B,), got {shown}")
        return torch.stack([codes.long() for codes in columns], dim=1)
    if groups.dim() not in (1, 2) or (groups.dim() == 2 and groups.shape[1] == 0):
        shape = tuple(groups.shape)
        raise ValueError(f"groups must have shape (B,) or (B, C), C >= 1, got {shape}")
    return (groups[:, None] if groups.dim() == 1 else groups).long()


def group_membership(groups: Tensor, num_groups: Sequence[int]) -> Tensor:
    """Return who belongs to which group: bool (R, B) for codes (B, C), R = sum(num_groups).

    Rows run through the groups of the first attribute, then of the second, and so on; a code
    outside 0..G-1 (such as -1, unknown) is in no row.
    """
    # Attribute by attribute: an index built on the CPU would have to wait for the device.
    rows = [
        codes == torch.arange(count, device=groups.device)[:, None]
        for codes, count in zip(groups.unbind(1), num_groups, strict=True)
    ]
    return torch.cat(rows) if len(rows) > 1 else rows[0]


@dataclass(eq=False, repr=False)
class FairnessOptions:
    """The options of the fairness term, checked once; see `sinkhorn_fairness`."""

    p: int
    blur: float
    group_reduction: GroupReduction
    min_group_size: int
    detach: Detach
    divide_by_group_sum: bool

    def __post_init__(self) -> None:
        self.solver = SinkhornOptions(p=self.p, blur=self.blur, validate=False)
        self.blur = float(self.blur)
        check_choice("group_reduction", self.group_reduction, ("mean", "sum"))
        check_choice("detach", self.detach, ("none", "groups", "total"))
        check_integer("min_group_size", self.min_group_size, 1)


def sinkhorn_fairness(
    scores: Tensor,
    groups: Tensor | Mapping[str, Tensor],
    num_groups: Sequence[int],
    *,
    p: int = 1,
    blur: float = 0.0,
    attribute_weights: Sequence[float] | None = None,
    group_reduction: GroupReduction = "mean",
    min_group_size: int = 2,
    detach: Detach = "none",
    divide_by_group_sum: bool = False,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    queue: Tensor | None = None,
    queue_weights: Tensor | None = None,
    validate: bool | None = None,
) -> FairnessTerms:
    r"""Return the Sinkhorn divergences between the scores of a batch and of each of its groups.

    .. math::
        F = \sum_c w_c \frac{1}{|G_c|} \sum_{g \in G_c} S_\varepsilon(D_{batch}, D_g)

    over the groups G_c of attribute c that have a mass of at least ``min_group_size``; an attribute
    without any adds 0. The mass of a score, in the batch's distribution as in its group's, is its
    weight. Both distributions are of the very same points, so gradients reach a score through its
    group and through the batch (see ``detach``).

    Arguments and defaults are as of `SinkhornFairnessLoss` and its ``forward``, but: ``num_groups``
    are the G_c in the attributes' order, and a code outside 0..G_c-1 counts as unknown; ``queue``
    are recent detached scores, (1 + R, K), NaN where empty: row 0 of the whole batch, row 1 + r of
    group r. They widen both distributions, by their ``queue_weights`` (None is 1 each), and get no
    gradient.

    All terms but ``counts`` are connected to the graph of ``scores``, float64 for float64 scores,
    else float32.

    Raises:
        ValueError: scores or weights not (B,) floating point, NaN or infinite; negative weights;
            groups of another length, not integer, or of another number of attributes than
            ``num_groups``; a valid, queue, queue_weights or attribute_weights of the wrong shape;
            an option out of range.

    Source: Bansal et al. (arXiv:2505.03153), the fairness loss; Luo et al. (arXiv:2403.19949),
    eq. 3-4; averaged over groups instead of summed.
    """
    options = FairnessOptions(p, blur, group_reduction, min_group_size, detach, divide_by_group_sum)
    check_scores(scores, weights, valid, validate)
    codes = check_codes(groups, scores)
    given = tuple(num_groups)
    if codes.shape[1] != len(given):
        raise ValueError(
            f"num_groups must count the groups of {codes.shape[1]} attributes, got {given}"
        )
    if any(count < 1 for count in given):
        raise ValueError(f"num_groups must be integers >= 1, got {given}")
    if attribute_weights is not None and len(attribute_weights) != len(given):
        raise ValueError(
            f"attribute_weights must have {len(given)} entries, got {len(attribute_weights)}"
        )
    rows = 1 + sum(given)
    if queue is not None and (queue.dim() != 2 or queue.shape[0] != rows):
        raise ValueError(f"queue must have shape ({rows}, K), got {tuple(queue.shape)}")
    if queue_weights is not None and (queue is None or queue_weights.shape != queue.shape):
        raise ValueError(
            "queue_weights must have the shape of queue, got "
            f"{tuple(queue_weights.shape)} and {None if queue is None else tuple(queue.shape)}"
        )
    return fairness_terms(
        scores, codes, given, options, attribute_weights, weights, valid, queue, queue_weights
    )


def check_scores(
    scores: Tensor, weights: Tensor | None, valid: Tensor | None, validate: bool | None
) -> None:
    """Refuse scores that are no floating point tensor (B,), or not finite where they are valid.

    Refuse weights likewise, and those below 0.
    """
    if not isinstance(scores, Tensor):
        raise ValueError(f"scores must be a tensor, got {type(scores).__name__}")
    shape = tuple(scores.shape)
    if scores.dim() != 1 or not scores.is_floating_point():
        raise ValueError(f"scores must be floating point of shape (B,), got {scores.dtype} {shape}")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != scores.shape):
        raise ValueError(
            f"valid must be bool of shape {shape}, got {valid.dtype} {tuple(valid.shape)}"
        )
    if weights is not None and not (weights.is_floating_point() and weights.shape == scores.shape):
        raise ValueError(
            f"weights must be floating point of shape {shape}, "
            f"got {weights.dtype} {tuple(weights.shape)}"
        )
    if not should_validate(scores, validate):
        return
    if weights is not None and not all_at_least(weights, 0):
        bad = int((~((weights >= 0) & torch.isfinite(weights))).sum())
        raise ValueError(f"weights must be finite and >= 0, got others at {bad} of {shape[0]}")
    counted = scores if valid is None else torch.where(valid, scores, 0.0)
    if not all_at_least(counted, -math.inf):
        bad = int((~torch.isfinite(counted)).sum())
        raise ValueError(f"scores must be finite, got NaN or infinity at {bad} of {shape[0]}")


def check_codes(groups: Tensor | Mapping[str, Tensor], scores: Tensor) -> Tensor:
    """Return the codes (B, C) beside the scores; refuse those of another number of rows."""
    codes = stack_groups(groups)
    if codes.shape[0] != scores.shape[0]:
        raise ValueError(
            f"groups must have one row a score: {scores.shape[0]} scores, {codes.shape[0]} rows"
        )
    return codes.to(scores.device, non_blocking=scores.device.type == "cuda")


def fairness_terms(
    scores: Tensor,
    codes: Tensor,
    num_groups: Sequence[int],
    options: FairnessOptions,
    attribute_weights: Sequence[float] | None,
    weights: Tensor | None,
    valid: Tensor | None,
    queue: Tensor | None,
    queue_weights: Tensor | None,
) -> FairnessTerms:
    """Return what `sinkhorn_fairness` does, of arguments that have been checked."""
    mass = None if valid is None else valid.to(torch.float32)
    if weights is not None:
        mass = weights.detach().to(torch.float32)
        mass = mass if valid is None else torch.where(valid, mass, 0.0)
    if valid is not None:
        scores = torch.where(valid, scores, 0.0)
    groups = group_membership(codes, num_groups).to(torch.float32)
    groups = groups if mass is None else groups * mass
    if queue is not None:
        scores, mass, groups = _with_queue(scores, mass, groups, queue, queue_weights)
    counts = groups.sum(-1)
    large_enough = counts >= options.min_group_size
    groups = groups * large_enough[:, None]
    x = y = scores[:, None]
    if options.detach == "groups":
        y = x.detach()
    elif options.detach == "total":
        x = x.detach()
    if options.divide_by_group_sum:
        sums = (groups * y[:, 0]).sum(-1, keepdim=True)
        y = (y[:, 0] / torch.where(large_enough[:, None], sums, 1.0))[..., None]
    per_group = divergence(x, y, mass, groups, options.solver)
    # A split costs more than all else here.
    several = len(num_groups) > 1
    parts = torch.split(per_group, list(num_groups)) if several else (per_group,)
    present = torch.split(large_enough, list(num_groups)) if several else (large_enough,)
    values = [part.sum() for part in parts]
    if options.group_reduction == "mean":
        values = [v / n.sum().clamp(min=1) for v, n in zip(values, present, strict=True)]
    per_attribute = torch.stack(values)
    if attribute_weights is None:
        return FairnessTerms(per_attribute.mean(), per_attribute, per_group, counts)
    weighted = [w * value for w, value in zip(attribute_weights, values, strict=True)]
    return FairnessTerms(torch.stack(weighted).sum(), per_attribute, per_group, counts)


def _with_queue(
    scores: Tensor,
    mass: Tensor | None,
    groups: Tensor,
    queue: Tensor,
    queue_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Append the queued scores: row r of the queue belongs to measure r alone."""
    rows, length = queue.shape
    filled = ~queue.isnan()
    # Promoted: half precision scores meet a float32 queue.
    points = torch.cat([scores, torch.where(filled, queue.detach(), 0.0).flatten()])
    queued = filled.to(torch.float32) if queue_weights is None else filled * queue_weights
    # Block r of the columns is row r's: a diagonal of blocks.
    own = (torch.eye(rows, device=queue.device)[:, :, None] * queued).reshape(rows, rows * length)
    whole = torch.ones_like(groups[:1]) if mass is None else mass[None]
    measures = torch.cat([torch.cat([whole, groups]), own], dim=1)
    return points, measures[0], measures[1:]


def official_scores(logits: Tensor) -> Tensor:
    """Return ``s_i = sum_k L_ik L_ki``, (B,), the diagonal of ``L_I L_T^T`` in the published code.

    It is quadratic in the logit scale and mixes the pairs of the batch; for comparison only.
    The logits are (B, B); the result is float32 or wider.
    Source: the code published with arXiv:2403.19949 and arXiv:2505.03153.
    """
    logits = widened(logits)
    return (logits * logits.t()).sum(1)
