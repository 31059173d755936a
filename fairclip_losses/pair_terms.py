"""Per-pair terms of a given loss module: what FairLoss must know of the loss that it wraps.

A loss of your own takes part by a method ``pair_terms(**model_out) -> PairTerms``, and over several
processes by two attributes besides, ``rank`` and ``world_size``, as open_clip's losses have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .blockwise import blockwise_siglip_pair_losses
from .distributed import Processes, Route
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
    Over several processes B is either the global batch, the same everywhere, or this process's
    part, with terms whose mean over pairs and processes is that of the entry.
    """

    contrastive: Tensor
    named: dict[str, Tensor]


def pair_terms(loss: nn.Module, model_out: Mapping[str, Any]) -> PairTerms:
    """Return the per-pair terms of ``loss`` at ``model_out``, the keyword arguments of its forward.

    Raises:
        ValueError: a loss that is neither one of open_clip's four nor has ``pair_terms``, or
            model_out lacks what it needs; or several processes train and a loss with ``pair_terms``
            does not say which of them it is in.
    """
    own = getattr(loss, "pair_terms", None)
    if own is not None:
        _check_knows_its_process(loss)
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


def _check_knows_its_process(loss: nn.Module) -> None:
    """Refuse to take one of several processes for the only one: each would mine for itself."""
    if hasattr(loss, "world_size") or not torch.distributed.is_available():
        return
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ValueError(
            f"{torch.distributed.get_world_size()} processes train, and {type(loss).__name__} does "
            "not say which it is in: give it rank and world_size (world_size = 1 has each process "
            "mine and compare its own pairs alone)"
        )


def _inputs(model_out: Mapping[str, Any], prefix: str = "") -> tuple[Any, ...]:
    names = ("image_features", "text_features", "logit_scale")
    return (*(model_out[prefix + name] for name in names), model_out.get(f"{prefix}logit_bias"))


class _Directions(NamedTuple):
    """Logits of images against texts and back, a row a pair; ``labels`` is each row's own column.

    In one process the second is the first transposed. Over several the loss gathers them by its own
    rules: all pairs, or this process's pairs against all (``local_loss``).
    """

    per_image: Tensor
    per_text: Tensor
    labels: Tensor

    @classmethod
    def of(cls, loss: Any, model_out: Mapping[str, Any], prefix: str = "") -> _Directions:
        image, text, scale, bias = _inputs(model_out, prefix)
        if Processes.of(loss).world_size == 1:
            per_image = pair_logits(image, text, scale, bias)
            per_text = per_image.t()
            labels = torch.arange(per_image.shape[0], device=per_image.device)
        else:
            options = {} if bias is None else {"logit_bias": bias}
            per_image, per_text = loss.get_logits(image, text, scale, **options)
            labels = loss.get_ground_truth(image.device, per_image.shape[0])
        return cls(per_image, per_text, labels)

    def losses(self) -> Tensor:
        return clip_pair_losses(self.per_image, self.per_text, self.labels)


def _clip(loss: Any, model_out: Mapping[str, Any]) -> PairTerms:
    contrastive = _Directions.of(loss, model_out).losses()
    return PairTerms(contrastive, {"contrastive_loss": contrastive})


def _siglip(loss: Any, model_out: Mapping[str, Any]) -> PairTerms:
    image, text, scale, bias = _inputs(model_out)
    processes = Processes.of(loss)
    if processes.world_size == 1:
        contrastive = siglip_pair_losses(pair_logits(image, text, scale, bias))
    else:
        # The oldest versions have `bidir`, true or false, in place of `dist_impl`.
        route: Route = getattr(
            loss, "dist_impl", "bidir" if getattr(loss, "bidir", True) else "shift"
        )
        contrastive = blockwise_siglip_pair_losses(image, text, scale, bias, processes, route)
    return PairTerms(contrastive, {"contrastive_loss": contrastive})


def _coca(loss: Any, model_out: Mapping[str, Any]) -> PairTerms:
    contrastive = _Directions.of(loss, model_out).losses()
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
    student = _Directions.of(loss, model_out)
    teacher = _Directions.of(loss, model_out, "dist_")
    contrastive = student.losses()
    distill = distill_pair_losses(
        teacher.per_image, student.per_image, teacher.per_text, student.per_text
    )
    return PairTerms(contrastive, {"contrastive_loss": contrastive, "distill_loss": distill})


_TERMS: dict[str, Callable[[Any, Mapping[str, Any]], PairTerms]] = {
    "SigLipLoss": _siglip,
    "CoCaLoss": _coca,
    "DistillClipLoss": _distill,
    "ClipLoss": _clip,
}
