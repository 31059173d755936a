"""Per-pair terms of the image-text losses, as pure functions.

Each returns (B,) terms whose mean is the batch loss that open_clip computes, so a weighted batch
loss is a weighted mean of them.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..validation import check_choice, refuse_second

Normalization = Literal["batch", "weights"]


def pair_logits(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
) -> Tensor:
    """Return ``L = tau v t^T (+ bias)``, (B, B), for L2-normalised features (B, D).

    Raises:
        ValueError: features that are not two (B, D) of one shape.
    """
    _check_features(image_features, text_features)
    logits = logit_scale * image_features @ text_features.t()
    return logits if logit_bias is None else logits + logit_bias


def pair_similarities(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
) -> Tensor:
    """Return the diagonal of `pair_logits`, ``tau v_i . t_i (+ bias)``, (B,) float32 or wider."""
    _check_features(image_features, text_features)
    products = widened(image_features) * widened(text_features)
    scores = logit_scale * products.sum(1)
    return scores if logit_bias is None else scores + logit_bias


def _check_features(image_features: Tensor, text_features: Tensor) -> None:
    if image_features.dim() != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            "image_features and text_features must both be (B, D), got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )


def widened(values: Tensor) -> Tensor:
    """Half precision in float32, the rest as it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def clip_pair_losses(
    logits: Tensor, text_logits: Tensor | None = None, labels: Tensor | None = None
) -> Tensor:
    """Return ``l_i = (CE(L[i, :], i) + CE(L[:, i], i)) / 2``, (B,) float32 or wider.

    Args:
        logits: L (B, B), or the rows (B, M) of B pairs of a larger batch.
        text_logits: the same from the texts' side, (B, M); None: ``logits`` transposed.
        labels: (B,) column of each pair where ``text_logits`` is given; None: its own number.

    Raises:
        ValueError: logits that are not (B, B), without ``text_logits``.

    For L (B, B) the gradient takes one pass over the matrix; it cannot be differentiated again.
    Source: Radford et al. 2021 (arXiv:2103.00020), figure 3, before the mean.
    """
    if text_logits is None:
        losses: Tensor = _SymmetricCrossEntropy.apply(_square(logits))
        return losses
    if labels is None:
        labels = torch.arange(logits.shape[0], device=logits.device)
    sides = [F.cross_entropy(widened(s), labels, reduction="none") for s in (logits, text_logits)]
    return 0.5 * (sides[0] + sides[1])


def siglip_pair_losses(logits: Tensor) -> Tensor:
    """Return ``l_i = (sum_j s_ij + sum_j s_ji) / 2``, (B,), s the sigmoid loss of each image-text.

    ``s_ij = -log sigmoid(z_ij L_ij)``, z = 1 on the diagonal and -1 off it, for L (B, B).

    Raises:
        ValueError: logits that are not (B, B).

    The gradient takes one pass over the matrix; it cannot be differentiated again.
    Source: Zhai et al. 2023 (arXiv:2303.15343), eq. 1, before the mean.
    """
    losses: Tensor = _SymmetricSigmoid.apply(_square(logits))
    return losses


def _square(logits: Tensor) -> Tensor:
    if logits.dim() != 2 or logits.shape[0] != logits.shape[1]:
        raise ValueError(f"logits must be (B, B), got {tuple(logits.shape)}")
    return widened(logits)


# Of the logits at a time: on a CPU 1 MiB, which stays in a core's cache; on an accelerator 64 MiB,
# for few launches and little memory beside the matrix.
BLOCK_ENTRIES_CPU, BLOCK_ENTRIES = 2**18, 2**24


def _row_blocks(logits: Tensor) -> list[slice]:
    entries = BLOCK_ENTRIES_CPU if logits.device.type == "cpu" else BLOCK_ENTRIES
    rows = max(entries // max(len(logits), 1), 1)
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


class _SymmetricCrossEntropy(torch.autograd.Function):
    """Half of the logsumexp of row i and of column i, less the diagonal, from one matrix."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        row_max, row_sum = logits.new_empty(len(logits)), logits.new_empty(len(logits))
        column_max, column_sum = torch.full_like(row_max, -torch.inf), torch.zeros_like(row_max)
        for block in _row_blocks(logits):
            part = logits[block]
            row_max[block] = part.amax(1)
            row_sum[block] = (part - row_max[block, None]).exp_().sum(1)
            largest = torch.maximum(column_max, part.amax(0))
            column_sum *= (column_max - largest).exp_()
            column_sum += (part - largest).exp_().sum(0)
            column_max = largest
        ctx.save_for_backward(logits, row_max, row_sum, column_max, column_sum)
        own = logits.diagonal()
        return 0.5 * (row_sum.log() + column_sum.log() + (row_max - own) + (column_max - own))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, row_max, row_sum, column_max, column_sum = ctx.saved_tensors
        with torch.no_grad():
            per_row, per_column = 0.5 * grad / row_sum, 0.5 * grad / column_sum
            result = torch.empty_like(logits)
            for block in _row_blocks(logits):
                part = logits[block]
                by_row = (part - row_max[block, None]).exp_().mul_(per_row[block, None])
                result[block] = (part - column_max).exp_().mul_(per_column).add_(by_row)
            result.diagonal().sub_(grad)
        return refuse_second("clip_pair_losses", [result], [logits])[0]


class _SymmetricSigmoid(torch.autograd.Function):
    """Half of the sums of row i and of column i of the sigmoid losses, from one matrix."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        rows, columns = logits.new_empty(len(logits)), logits.new_zeros(len(logits))
        for block in _row_blocks(logits):
            signed = -logits[block]
            signed.diagonal(block.start).neg_()
            losses = F.logsigmoid(signed).neg_()
            rows[block] = losses.sum(1)
            columns += losses.sum(0)
        return 0.5 * (rows + columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (logits,) = ctx.saved_tensors
        with torch.no_grad():
            half, result = 0.5 * grad, torch.empty_like(logits)
            for block in _row_blocks(logits):
                result[block] = logits[block].sigmoid().mul_(half[block, None] + half)
            result.diagonal().copy_(-grad * (-logits.diagonal()).sigmoid())
        return refuse_second("siglip_pair_losses", [result], [logits])[0]


def caption_pair_losses(logits: Tensor, labels: Tensor, pad_id: int = 0) -> Tensor:
    """Return each caption's share of CoCa's token loss, (B,), for logits (B, T, V), labels (B, T).

    ``c_i = B / T_all * sum over the tokens of i of CE``, T_all the tokens of the batch that are not
    padding: the mean over i is the mean over tokens.
    Source: Yu et al. 2022 (arXiv:2205.01917), eq. 3.
    """
    by_class = widened(logits).transpose(1, 2)
    tokens = F.cross_entropy(by_class, labels, ignore_index=pad_id, reduction="none")
    return tokens.sum(1) * labels.shape[0] / (labels != pad_id).sum()


def distill_pair_losses(
    teacher_logits: Tensor,
    student_logits: Tensor,
    teacher_text_logits: Tensor | None = None,
    student_text_logits: Tensor | None = None,
) -> Tensor:
    """Return each pair's cross-entropy against the teacher, (B,) float32 or wider.

    ``d_i = (H(softmax T[i, :], softmax S[i, :]) + H(softmax T[:, i], softmax S[:, i])) / 2`` with
    the cross-entropy ``H(p, q) = -sum_j p_j log q_j``, for logits (B, B) of teacher T, student S;
    or for the rows (B, M) of B pairs of a larger batch, which need those of the texts' side too.
    Source: Hinton et al. 2015 (arXiv:1503.02531), at temperature 1.
    """
    if teacher_text_logits is None or student_text_logits is None:
        teacher_text_logits, student_text_logits = teacher_logits.t(), student_logits.t()
    sides = ((teacher_logits, student_logits), (teacher_text_logits, student_text_logits))
    images, texts = (
        -(widened(teacher).softmax(1) * widened(student).log_softmax(1)).sum(1)
        for teacher, student in sides
    )
    return 0.5 * (images + texts)


def normalized_weights(weights: Tensor, normalization: Normalization = "batch") -> Tensor:
    """Return the weights u (B,) of a mean: ``"batch"``: u = w; ``"weights"``: u = B w / sum(w).

    ``"batch"`` is the published one.

    Raises:
        ValueError: an unknown normalization.
    """
    check_choice("normalization", normalization, ("batch", "weights"))
    if normalization == "batch":
        return weights
    return weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny) * weights.numel()


def weighted_mean(terms: Tensor, weights: Tensor, normalization: Normalization = "batch") -> Tensor:
    """Return the mean of ``terms`` (B,): ``1/B sum_i u_i terms_i``, u as of `normalized_weights`.

    A pair of weight 0 is left out, whatever its term is (NaN included).

    Raises:
        ValueError: terms and weights that are not both (B,), or an unknown normalization.
    """
    if terms.dim() != 1 or terms.shape != weights.shape:
        raise ValueError(
            "terms and weights must both be (B,), "
            f"got {tuple(terms.shape)} and {tuple(weights.shape)}"
        )
    scaled = normalized_weights(weights, normalization).to(terms.dtype)
    return (scaled * torch.where(scaled != 0, terms, 0.0)).mean()
