"""Per-pair terms of a given loss module: what FairLoss must know of the loss that it wraps.

A loss of your own takes part by a method ``pair_terms(**model_out) -> PairTerms``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .functional import (
    caption_pair_losses,
    clip_pair_losses,
    distill_pair_losses,
    pair_logits,
    siglip_pair_losses,
)


class PairTerms(NamedTuple):
    """Per-pair terms of a batch loss.

    ``named`` maps each entry of the loss's dict form to its terms (B,), whose mean is that entry.
    ``contrastive`` (B,) is what the miner records and the fairness term compares, unscaled.
    """

    contrastive: Tensor
    named: dict[str, Tensor]


def pair_terms(loss: nn.Module, model_out: Mapping[str, Any]) -> PairTerms:
    """Return the per-pair terms of ``loss`` at ``model_out``, the keyword arguments of its forward.

    Raises:
        ValueError: a loss that is neither one of open_clip's four nor has ``pair_terms``, or
            model_out lacks what it needs.
    """
    own = getattr(loss, "pair_terms", None)
    if own is not None:
        terms = own(**model_out)
        if not isinstance(terms, PairTerms):
            raise ValueError(
                f"{type(loss).__name__}.pair_terms must return PairTerms, "
                f"got {type(terms).__name__}"
            )
        return terms
    # By the names of its classes, so that open_clip need not be imported and subclasses count.
    for cls in type(loss).__mro__:
        if cls.__name__ in _TERMS:
            try:
                return _TERMS[cls.__name__](loss, model_out)
            except KeyError as missing:
                raise ValueError(
                    f"{type(loss).__name__} needs {missing} in the model's output, "
                    f"got {sorted(model_out)}"
                ) from None
    raise ValueError(
        "expected a ClipLoss, SigLipLoss, CoCaLoss or DistillClipLoss of open_clip or a module "
        f"with pair_terms(**model_out), got {type(loss).__name__}"
    )


def _logits(model_out: Mapping[str, Any], prefix: str = "") -> Tensor:
    return pair_logits(
        model_out[f"{prefix}image_features"],
        model_out[f"{prefix}text_features"],
        model_out[f"{prefix}logit_scale"],
        model_out.get(f"{prefix}logit_bias"),
    )


def _clip(loss: Any, model_out: Mapping[str, Any]) -> PairTerms:
    contrastive = clip_pair_losses(_logits(model_out))
    return PairTerms(contrastive, {"contrastive_loss": contrastive})


def _siglip(loss: Any, model_out: Mapping[str, Any]) -> PairTerms:
    contrastive = siglip_pair_losses(_logits(model_out))
    return PairTerms(contrastive, {"contrastive_loss": contrastive})


def _coca(loss: Any, model_out: Mapping[str, Any]) -> PairTerms:
    contrastive = clip_pair_losses(_logits(model_out))
    caption = caption_pair_losses(
        model_out["logits"], model_out["labels"], loss.caption_loss.ignore_index
    )
    return PairTerms(
        contrastive,
        {
            "contrastive_loss": _scaled(contrastive, loss.clip_loss_weight),
            "caption_loss": loss.caption_loss_weight * caption,
        },
    )


def _scaled(terms: Tensor, weight: float) -> Tensor:
    # CoCaLoss of weight 0 leaves the term out, so that a NaN in it does not come through.
    return weight * terms if weight else torch.zeros_like(terms)


def _distill(loss: Any, model_out: Mapping[str, Any]) -> PairTerms:
    logits = _logits(model_out)
    contrastive = clip_pair_losses(logits)
    distill = distill_pair_losses(_logits(model_out, "dist_"), logits)
    return PairTerms(contrastive, {"contrastive_loss": contrastive, "distill_loss": distill})


_TERMS: dict[str, Callable[[Any, Mapping[str, Any]], PairTerms]] = {
    "SigLipLoss": _siglip,
    "CoCaLoss": _coca,
    "DistillClipLoss": _distill,
    "ClipLoss": _clip,
}
