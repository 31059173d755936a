"""Per-pair terms of a given loss module: what FairLoss must know of the loss that it wraps.

A loss of your own takes part by a method ``pair_terms(**model_out) -> PairTerms``, and over several
processes by two attributes besides, ``rank`` and ``world_size``, as open_clip's losses have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
    `FairLoss` makes the loss of them alone: one name is returned as a scalar in plain form, several
    as a tuple in their order. ``contrastive`` (B,) is what the miner records and the fairness term
    compares, unscaled. Over several processes B is either the global batch, the same everywhere, or
    this process's part, with terms whose mean over pairs and processes is that of the entry.
    """

    contrastive: Tensor
    named: dict[str, Tensor]


def pair_terms(loss: nn.Module, model_out: Mapping[str, Any]) -> PairTerms:
    """Return the per-pair terms of ``loss`` at ``model_out``, the keyword arguments of its forward.

    Raises:
        ValueError: a loss that is neither one of open_clip's four nor has ``pair_terms``, or is a
            subclass of these with a forward of its own; terms that are not (B,); model_out lacks
            what the loss needs; or several processes train and a loss with ``pair_terms`` does not
            say which of them it is in.
    """
    name = type(loss).__name__
    own = getattr(loss, "pair_terms", None)
    if own is not None:
        _check_knows_its_process(loss)
        terms = own(**model_out)
        if not isinstance(terms, PairTerms):
            raise ValueError(f"{name}.pair_terms must return PairTerms, got {type(terms).__name__}")
        _check_shapes(terms, Processes.of(loss).world_size > 1)
        return terms
    # By the names of its classes, so that open_clip need not be imported and subclasses count.
    known = next((cls for cls in type(loss).__mro__ if cls.__name__ in _TERMS), None)
    if known is None:
        raise ValueError(
            "expected a ClipLoss, SigLipLoss, CoCaLoss or DistillClipLoss of open_clip or a module "
            f"with pair_terms(**model_out), got {name}"
        )
    if vars(known)["forward"] is not getattr(type(loss), "forward", None):
        raise ValueError(
            f"{name} has a forward of its own, which the terms of {known.__name__} do not say: "
            "give it a method pair_terms(**model_out)"
        )
    try:
        return _TERMS[known.__name__](loss, model_out)
    except KeyError as missing:
        raise ValueError(
            f"{name} needs {missing} in the model's output, got {sorted(model_out)}"
        ) from None


def _check_shapes(terms: PairTerms, several_processes: bool) -> None:
    if not terms.named:
        raise ValueError("pair_terms must name at least one term, got none")
    count = terms.contrastive.numel()
    for name, values in (("contrastive", terms.contrastive), *terms.named.items()):
        # Over several processes some terms are of this one's pairs and some of all.
        if values.dim() != 1 or (values.shape[0] != count and not several_processes):
            raise ValueError(
                f"the terms of pair_terms must all have shape (B,), B = {count}, "
                f"got {name} of shape {tuple(values.shape)}"
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


class _Logits(NamedTuple):
    """Logits of images against texts, and of texts against images where that is another matrix.

    Over several processes the loss gathers them by its own rules: all pairs against all, or this
    process's pairs against all (``local_loss``), a row a pair with ``labels`` its own column.
    """

    per_image: Tensor
    per_text: Tensor | None = None
    labels: Tensor | None = None

    @classmethod
    def of(cls, loss: Any, model_out: Mapping[str, Any], prefix: str = "") -> _Logits:
        image, text, scale, bias = _inputs(model_out, prefix)
        if Processes.of(loss).world_size == 1:
            return cls(pair_logits(image, text, scale, bias))
        options = {} if bias is None else {"logit_bias": bias}
        per_image, per_text = loss.get_logits(image, text, scale, **options)
        if not loss.local_loss:
            return cls(per_image)
        return cls(per_image, per_text, loss.get_ground_truth(image.device, per_image.shape[0]))


def _clip(loss: Any, model_out: Mapping[str, Any]) -> PairTerms:
    contrastive = clip_pair_losses(*_Logits.of(loss, model_out))
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
        contrastive = _blockwise_siglip(image, text, scale, bias, processes, route)
    return PairTerms(contrastive, {"contrastive_loss": contrastive})


def _coca(loss: Any, model_out: Mapping[str, Any]) -> PairTerms:
    contrastive = clip_pair_losses(*_Logits.of(loss, model_out))
    caption = caption_pair_losses(
        model_out["logits"], model_out["labels"], loss.caption_loss.ignore_index
    )
    # CoCaLoss of weight 0 leaves the term out, so that a NaN in it does not come through.
    weight = loss.clip_loss_weight
    named = {"contrastive_loss": weight * contrastive if weight else torch.zeros_like(contrastive)}
    return PairTerms(contrastive, {**named, "caption_loss": loss.caption_loss_weight * caption})


def _distill(loss: Any, model_out: Mapping[str, Any]) -> PairTerms:
    student = _Logits.of(loss, model_out)
    teacher = _Logits.of(loss, model_out, "dist_")
    contrastive = clip_pair_losses(*student)
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


def _blockwise_siglip(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    processes: Processes,
    route: Route,
) -> Tensor:
    """Return ``l_i = (sum_j s_ij + sum_j s_ji) / 2`` of this process's pairs, (b,), j over all.

    ``s_ij = -log sigmoid(z_ij L_ij)`` as in `siglip_pair_losses`. The others' features come
    one block at a time along ``route``; only that block of the logits, (b, b) of the global
    (W b, W b), is there at any time, in the backward pass too, which makes it anew.

    The gradient is that of the sum over processes of what each makes of its own terms, as that of
    open_clip's exchanges of features. All processes must take both passes.
    """
    scale = torch.as_tensor(logit_scale, device=image.device)
    bias = torch.zeros_like(scale) if logit_bias is None else logit_bias
    bias = torch.as_tensor(bias, device=image.device)
    losses: Tensor = _BlockwiseSiglip.apply(image, text, scale, bias, processes, route)
    return losses


class _BlockwiseSiglip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        processes: Processes,
        route: Route,
    ) -> Tensor:
        ctx.save_for_backward(image, text, scale, bias)
        ctx.processes, ctx.route = processes, route
        kind = image.device.type
        ctx.autocast = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
        }
        losses = torch.zeros((), device=image.device)
        for rank, images, texts in _blocks(image, text, processes, route):
            own = rank == processes.rank
            rows = _sigmoid_block(image, texts, scale, bias, own)
            columns = _sigmoid_block(text, images, scale, bias, own)
            losses = losses + 0.5 * (rows.sum(1) + columns.sum(1))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        processes = ctx.processes
        leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        image, text, scale, bias = leaves
        # Entry ij of the matrix is half of pair i's loss and half of pair j's.
        by_rank = processes.gather(grad).chunk(processes.world_size)
        sums = [
            torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))
            for leaf in leaves
        ]
        for rank, images, texts in _blocks(image, text, processes, ctx.route):
            own = rank == processes.rank
            share = 0.5 * (grad[:, None] + by_rank[rank])
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                rows = _sigmoid_block(image, texts, scale, bias, own)
                columns = _sigmoid_block(text, images, scale, bias, own)
                objective = (share * rows).sum() + (share * columns).sum()
            for total, part in zip(sums, torch.autograd.grad(objective, leaves), strict=True):
                total += part
        # Each entry is in the rows of one process and in the columns of one: twice for these two.
        sums[2:] = [0.5 * total for total in sums[2:]]
        needed = zip(sums, leaves, ctx.needs_input_grad, strict=False)
        grads = (total.to(leaf.dtype) if need else None for total, leaf, need in needed)
        return (*grads, None, None)


def _blocks(
    image: Tensor, text: Tensor, processes: Processes, route: Route
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (rank, image features, text features) of every process, this one's first."""
    yield processes.rank, image.detach(), text.detach()
    for rank, both in processes.others(torch.stack([image, text], dim=1), route):
        yield rank, both[:, 0], both[:, 1]


def _sigmoid_block(rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, own: bool) -> Tensor:
    """Return the sigmoid losses of a block; its diagonal is the matching pairs where it is own."""
    logits = scale * rows @ columns.t() + bias
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    matches = torch.zeros_like(logits, dtype=torch.bool).fill_diagonal_(own)
    return -F.logsigmoid(torch.where(matches, logits, -logits))
