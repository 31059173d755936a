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


def clip_pair_losses(logits: Tensor) -> Tensor:
    """Return ``l_i = (CE(L[i, :], i) + CE(L[:, i], i)) / 2``, (B,) float32 or wider.

    Source: Radford et al. 2021 (arXiv:2103.00020), figure 3, before the mean.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -0.5 * (logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal())


def siglip_pair_losses(logits: Tensor) -> Tensor:
    """Return ``l_i = (sum_j s_ij + sum_j s_ji) / 2``, (B,), s the sigmoid loss of each image-text.

    ``s_ij = -log sigmoid(z_ij L_ij)``, z = 1 on the diagonal and -1 off it.
    Source: Zhai et al. 2023 (arXiv:2303.15343), eq. 1, before the mean.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    sign = 2.0 * torch.eye(logits.shape[0], dtype=logits.dtype, device=logits.device) - 1.0
    terms = -F.logsigmoid(sign * logits)
    return 0.5 * (terms.sum(1) + terms.sum(0))


def caption_pair_losses(logits: Tensor, labels: Tensor, pad_id: int = 0) -> Tensor:
    """Return each caption's share of CoCa's token loss, (B,), for logits (B, T, V), labels (B, T).

    ``c_i = B / T_all * sum over the tokens of i of CE``, T_all the tokens of the batch that are not
    padding: the mean over i is the mean over tokens.
    Source: Yu et al. 2022 (arXiv:2205.01917), eq. 3.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tokens = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=pad_id, reduction="none")
    return tokens.sum(1) * labels.shape[0] / (labels != pad_id).sum()


def distill_pair_losses(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Return each pair's cross-entropy against the teacher, (B,) float32 or wider.

    ``d_i = (H(softmax T[i, :], softmax S[i, :]) + H(softmax T[:, i], softmax S[:, i])) / 2`` with
    the cross-entropy ``H(p, q) = -sum_j p_j log q_j``, for logits (B, B) of teacher T, student S.
    Source: Hinton et al. 2015 (arXiv:1503.02531), at temperature 1.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    teacher, student = teacher_logits.to(dtype), student_logits.to(dtype)
    rows = -(teacher.softmax(1) * student.log_softmax(1)).sum(1)
    columns = -(teacher.softmax(0) * student.log_softmax(0)).sum(0)
    return 0.5 * (rows + columns)


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
    if normalization == "weights":
        weights = weights * (weights.numel() / weights.sum())
    elif normalization != "batch":
        raise ValueError(f"normalization must be 'batch' or 'weights', got {normalization!r}")
    change = weights.to(terms.dtype) - 1.0
    flagged = change != 0
    return (change * torch.where(flagged, terms, 0.0)).sum() / max(terms.numel(), 1)
