"""SigLIP's per-pair losses over processes, block by block of the global matrix of logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .distributed import Processes, Route
from .functional.pairs import sigmoid_losses


def blockwise_siglip_pair_losses(
    image_features: Tensor,
    text_features: Tensor,
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
    scale = torch.as_tensor(logit_scale, device=image_features.device)
    bias = torch.zeros_like(scale) if logit_bias is None else logit_bias
    bias = torch.as_tensor(bias, device=image_features.device)
    losses: Tensor = _BlockwiseLosses.apply(
        image_features, text_features, scale, bias, processes, route
    )
    return losses


class _BlockwiseLosses(torch.autograd.Function):
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
    matches = torch.zeros_like(logits, dtype=torch.bool)
    return sigmoid_losses(logits, matches.fill_diagonal_(own))
