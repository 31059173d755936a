"""Per-pair terms of the image-text losses, as pure functions.

Each returns (B,) terms whose mean is the batch loss that open_clip computes, so a weighted batch
loss is a weighted mean of them.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """Return ``s_i = tau v_i . t_i (+ bias)``, (B,) float32 or wider: the diagonal of the logits.

    Raises:
        ValueError: features that are not two (B, D) of one shape.
    """
    _check_features(image_features, text_features)
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    scores = logit_scale * (image_features.to(dtype) * text_features.to(dtype)).sum(1)
    return scores if logit_bias is None else scores + logit_bias


def _check_features(image_features: Tensor, text_features: Tensor) -> None:
    if image_features.dim() != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            "image_features and text_features must both be (B, D), got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )


def clip_pair_losses(
    logits: Tensor, text_logits: Tensor | None = None, labels: Tensor | None = None
) -> Tensor:
    """Return ``l_i = (CE(L[i, :], i) + CE(L[:, i], i)) / 2``, (B,) float32 or wider.

    Args:
        logits: L (B, B), or the rows (B, M) of B pairs of a larger batch.
        text_logits: the same from the texts' side, (B, M); None: ``logits`` transposed.
        labels: (B,) column of each pair; None: its own number.

    Source: Radford et al. 2021 (arXiv:2103.00020), figure 3, before the mean.
    """
    per_image, per_text, labels = _both_sides(logits, text_logits, labels)
    return 0.5 * (_cross_entropies(per_image, labels) + _cross_entropies(per_text, labels))


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Return what ``F.cross_entropy(logits, labels, reduction="none")`` does, to the bit.

    That one splits its rows among all threads however few they are, which on a machine that has
    other work costs more than the loss.
    """
    return -logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)


def siglip_pair_losses(
    logits: Tensor, text_logits: Tensor | None = None, labels: Tensor | None = None
) -> Tensor:
    """Return ``l_i = (sum_j s_ij + sum_j s_ji) / 2``, (B,), s the sigmoid loss of each image-text.

    ``s_ij = -log sigmoid(z_ij L_ij)``, z = 1 on the diagonal and -1 off it. Arguments as for
    `clip_pair_losses`.

    Source: Zhai et al. 2023 (arXiv:2303.15343), eq. 1, before the mean.
    """
    per_image, per_text, labels = _both_sides(logits, text_logits, labels)
    matches = torch.arange(per_image.shape[1], device=labels.device) == labels[:, None]
    return 0.5 * (sigmoid_losses(per_image, matches) + sigmoid_losses(per_text, matches)).sum(1)


def sigmoid_losses(logits: Tensor, matches: Tensor) -> Tensor:
    """Return ``-log sigmoid(z L)`` of each image and text, (B, M), z = 1 at matches, else -1."""
    return -F.logsigmoid(torch.where(matches, logits, -logits))


def _both_sides(
    logits: Tensor, text_logits: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(dtype)
    per_text = logits.t() if text_logits is None else text_logits.to(dtype)
    if labels is None:
        labels = torch.arange(logits.shape[0], device=logits.device)
    return logits, per_text, labels


def caption_pair_losses(logits: Tensor, labels: Tensor, pad_id: int = 0) -> Tensor:
    """Return each caption's share of CoCa's token loss, (B,), for logits (B, T, V), labels (B, T).

    ``c_i = B / T_all * sum over the tokens of i of CE``, T_all the tokens of the batch that are not
    padding: the mean over i is the mean over tokens.
    Source: Yu et al. 2022 (arXiv:2205.01917), eq. 3.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tokens = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=pad_id, reduction="none")
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
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    if teacher_text_logits is None or student_text_logits is None:
        teacher_text_logits, student_text_logits = teacher_logits.t(), student_logits.t()
    sides = ((teacher_logits, student_logits), (teacher_text_logits, student_text_logits))
    images, texts = (
        -(teacher.to(dtype).softmax(1) * student.to(dtype).log_softmax(1)).sum(1)
        for teacher, student in sides
    )
    return 0.5 * (images + texts)


def normalized_weights(weights: Tensor, normalization: Normalization = "batch") -> Tensor:
    """Return the weights u (B,) of a mean: ``"batch"``: u = w; ``"weights"``: u = B w / sum(w).

    Raises:
        ValueError: an unknown normalization.
    """
    if normalization == "weights":
        return weights * (weights.numel() / weights.sum())
    if normalization != "batch":
        raise ValueError(f"normalization must be 'batch' or 'weights', got {normalization!r}")
    return weights


def reweighting(terms: Tensor, weights: Tensor, normalization: Normalization = "batch") -> Tensor:
    """Return what weights (B,) change in the mean of ``terms`` (B,): ``mean((u - 1) * terms)``.

    ``"batch"``: u = w, so that mean(terms) + this = mean(w * terms) (published).
    ``"weights"``: u = B w / sum(w), so that it is sum(w * terms) / sum(w).
    Exactly 0, with zero gradient, where every weight is 1 (or B is 0), whatever the terms (NaN
    included).

    Raises:
        ValueError: terms and weights that are not both (B,), or an unknown normalization.
    """
    if terms.dim() != 1 or terms.shape != weights.shape:
        raise ValueError(
            "terms and weights must both be (B,), "
            f"got {tuple(terms.shape)} and {tuple(weights.shape)}"
        )
    change = normalized_weights(weights, normalization).to(terms.dtype) - 1.0
    flagged = change != 0
    return (change * torch.where(flagged, terms, 0.0)).sum() / max(terms.numel(), 1)
