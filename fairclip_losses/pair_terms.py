"""Per-pair terms of a given loss module: what FairLoss must know of the loss that it wraps.

A loss of your own takes part by a method ``pair_terms(**model_out) -> PairTerms``, and over several
processes by two attributes besides, ``rank`` and ``world_size``, as open_clip's losses have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import Processes, Route
from .functional import (
    caption_pair_losses,
    clip_pair_losses,
    distill_pair_losses,
    pair_logits,
    siglip_pair_losses,
)
from .functional.pairs import widened
from .validation import refuse_second

_ALONE = Processes()


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
            what the loss needs; or the ``rank`` and ``world_size`` of the loss are not those of the
            process group. A loss that is none of open_clip's may say ``world_size = 1`` there.
    """
    name = type(loss).__name__
    check_processes(loss)
    if getattr(loss, "pair_terms", None) is not None:
        return _own_terms(loss, model_out)
    known = _known_classes(loss)
    if not known:
        raise ValueError(
            "expected a ClipLoss, SigLipLoss, CoCaLoss or DistillClipLoss of open_clip or a module "
            f"with pair_terms(**model_out), got {name}"
        )
    if known[0].forward is not type(loss).forward:
        raise ValueError(
            f"{name} has a forward of its own, which the terms of {known[0].__name__} do not say: "
            "give it a method pair_terms(**model_out)"
        )
    try:
        return _TERMS[known[0].__name__](loss, model_out)
    except KeyError as missing:
        raise ValueError(
            f"{name} needs {missing} in the model's output, got {sorted(model_out)}"
        ) from None


def trains_contrastive(loss: nn.Module) -> bool:
    """Whether the contrastive terms are trained: CoCaLoss leaves them out where they weigh 0."""
    own = getattr(loss, "pair_terms", None) is not None
    return own or bool(getattr(loss, "clip_loss_weight", 1))


def _known_classes(loss: nn.Module) -> list[Any]:
    """Return the classes of open_clip that a loss is of, the nearest first.

    By their names, so that open_clip need not be imported and subclasses count. (A list, for the
    compiler of torch 2.5 cannot follow `next`.)
    """
    return [cls for cls in type(loss).__mro__ if cls.__name__ in _TERMS]


def check_processes(loss: nn.Module) -> Processes:
    """Return the processes of a loss; refuse others than those of the process group.

    To take one of several processes for the only one would have each mine for itself.
    """
    if _is_alone(loss) and not (dist.is_available() and dist.is_initialized()):
        return _ALONE
    name, place, group = type(loss).__name__, Processes.of(loss), Processes.of_group()
    says_nothing, known = not hasattr(loss, "world_size"), _known_classes(loss)
    if place == group or (place.world_size == 1 and not says_nothing and not known):
        return place
    if says_nothing:
        raise ValueError(
            f"{group.world_size} processes train, and {name} does not say which it is in: give it "
            "rank and world_size (world_size = 1 has each process mine and compare its own pairs "
            "alone)"
        )
    options = f"rank={group.rank}, world_size={group.world_size}"
    if hasattr(loss, "local_loss"):
        options += ", local_loss=True, gather_with_grad=True"
    raise ValueError(
        f"this is process {group.rank} of {group.world_size} of torch.distributed, and {name} is "
        f"built with rank={place.rank}, world_size={place.world_size}: build it as "
        f"{name}({options})"
    )


def _is_alone(loss: object) -> bool:
    return int(getattr(loss, "world_size", 1)) == 1


def _own_terms(loss: nn.Module, model_out: Mapping[str, Any]) -> PairTerms:
    """Return the terms of a loss with a method for them."""
    name = type(loss).__name__
    terms = cast(Any, loss).pair_terms(**model_out)
    if not isinstance(terms, PairTerms):
        raise ValueError(f"{name}.pair_terms must return PairTerms, got {type(terms).__name__}")
    if not terms.named:
        raise ValueError("pair_terms must name at least one term, got none")
    count = terms.contrastive.numel()
    for name, values in (("contrastive", terms.contrastive), *terms.named.items()):
        # Over several processes some terms are of this one's pairs and some of all.
        if values.dim() != 1 or (values.shape[0] != count and _is_alone(loss)):
            raise ValueError(
                f"the terms of pair_terms must all have shape (B,), B = {count}, "
                f"got {name} of shape {tuple(values.shape)}"
            )
    return terms


def _inputs(model_out: Mapping[str, Any], prefix: str = "") -> tuple[Any, ...]:
    names = ("image_features", "text_features", "logit_scale")
    return (*(model_out[prefix + name] for name in names), model_out.get(f"{prefix}logit_bias"))


def _logits(
    loss: Any, model_out: Mapping[str, Any], prefix: str = ""
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return logits of images against texts, of texts against images, and labels, or None.

    Over several processes the loss gathers them by its own rules: all pairs against all, or this
    process's pairs against all (``local_loss``), a row a pair with the label its own column.
    """
    image, text, scale, bias = _inputs(model_out, prefix)
    if _is_alone(loss):
        return pair_logits(image, text, scale, bias), None, None
    options = {} if bias is None else {"logit_bias": bias}
    per_image, per_text = loss.get_logits(image, text, scale, **options)
    if not loss.local_loss:
        return per_image, None, None
    return per_image, per_text, loss.get_ground_truth(image.device, per_image.shape[0])


def _clip(loss: Any, model_out: Mapping[str, Any]) -> PairTerms:
    contrastive = clip_pair_losses(*_logits(loss, model_out))
    return PairTerms(contrastive, {"contrastive_loss": contrastive})


def _siglip(loss: Any, model_out: Mapping[str, Any]) -> PairTerms:
    image, text, scale, bias = _inputs(model_out)
    if _is_alone(loss):
        contrastive = siglip_pair_losses(pair_logits(image, text, scale, bias))
    else:
        # The oldest versions have `bidir`, true or false, in place of `dist_impl`.
        older = "bidir" if getattr(loss, "bidir", True) else "shift"
        scale = torch.as_tensor(scale, device=image.device)
        bias = torch.zeros_like(scale) if bias is None else bias
        bias = torch.as_tensor(bias, device=image.device)
        place = Processes.of(loss), getattr(loss, "dist_impl", older)
        contrastive = _BlockwiseSiglip.apply(image, text, scale, bias, *place)
    return PairTerms(contrastive, {"contrastive_loss": contrastive})


def _coca(loss: Any, model_out: Mapping[str, Any]) -> PairTerms:
    contrastive = clip_pair_losses(*_logits(loss, model_out))
    pad = loss.caption_loss.ignore_index
    caption = caption_pair_losses(model_out["logits"], model_out["labels"], pad)
    # CoCaLoss of weight 0 leaves the term out, so that a NaN in it does not come through.
    weight = loss.clip_loss_weight
    named = {"contrastive_loss": weight * contrastive if weight else torch.zeros_like(contrastive)}
    return PairTerms(contrastive, {**named, "caption_loss": loss.caption_loss_weight * caption})


def _distill(loss: Any, model_out: Mapping[str, Any]) -> PairTerms:
    student, teacher = _logits(loss, model_out), _logits(loss, model_out, "dist_")
    contrastive = clip_pair_losses(*student)
    distill = distill_pair_losses(teacher[0], student[0], teacher[1], student[1])
    return PairTerms(contrastive, {"contrastive_loss": contrastive, "distill_loss": distill})


_TERMS: dict[str, Callable[[Any, Mapping[str, Any]], PairTerms]] = {
    "SigLipLoss": _siglip,
    "CoCaLoss": _coca,
    "DistillClipLoss": _distill,
    "ClipLoss": _clip,
}


class _BlockwiseSiglip(torch.autograd.Function):
    """``l_i = (sum_j s_ij + sum_j s_ji) / 2`` of this process's pairs, (b,), j over all.

    ``s_ij = -log sigmoid(z_ij L_ij)`` as in `siglip_pair_losses`. The others' features come
    one block at a time along ``route``; only that block of the logits, (b, b) of the global
    (W b, W b), is there at any time, in the backward pass too, which makes it anew.

    The gradient is that of the sum over processes of what each makes of its own terms, as that of
    open_clip's exchanges of features. All processes must take both passes.
    """

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
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        processes = ctx.processes
        leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        image, text, scale, bias = leaves
        # Entry ij of the matrix is half of pair i's loss and half of pair j's.
        by_rank = processes.gather(grad).chunk(processes.world_size)
        sums = [torch.zeros_like(widened(leaf)) for leaf in leaves]
        for rank, images, texts in _blocks(image, text, processes, ctx.route):
            own = rank == processes.rank
            share = (0.5 * (grad[:, None] + by_rank[rank])).detach()
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                rows = _sigmoid_block(image, texts, scale, bias, own)
                columns = _sigmoid_block(text, images, scale, bias, own)
                objective = (share * rows).sum() + (share * columns).sum()
            for total, part in zip(sums, torch.autograd.grad(objective, leaves), strict=True):
                total += part
        # Each entry is in the rows of one process and in the columns of one: twice for these two.
        sums[2:] = [0.5 * total for total in sums[2:]]
        needed = zip(sums, leaves, ctx.needs_input_grad, strict=False)
        grads = [total.to(leaf.dtype) if need else None for total, leaf, need in needed]
        return (*refuse_second("siglip_pair_losses", grads, ctx.saved_tensors), None, None)


def _blocks(
    image: Tensor, text: Tensor, processes: Processes, route: Route
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (rank, image features, text features) of every process, this one's first."""
    yield processes.rank, image.detach(), text.detach()
    for rank, both in processes.others(torch.stack([image, text], dim=1), route):
        yield rank, both[:, 0], both[:, 1]


def _sigmoid_block(rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, own: bool) -> Tensor:
    """Return the sigmoid losses of a block; its diagonal is the matching pairs where it is own."""
    logits = widened(scale * rows @ columns.t() + bias)
    matches = torch.zeros_like(logits, dtype=torch.bool).fill_diagonal_(own)
    return -F.logsigmoid(torch.where(matches, logits, -logits))
