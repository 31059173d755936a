"""What a model gives each of open_clip's losses, and gradients with respect to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

TOKENS, VOCABULARY = 4, 6


def model_output(kind="clip", count=10, dim=8, seed=0, dtype=torch.float32, scale=10.0):
    """What the model of that loss gives, every floating point tensor a leaf with a gradient."""
    draw = torch.Generator().manual_seed(seed)

    def leaf(values):
        return values.to(dtype).requires_grad_()

    def features():
        return leaf(F.normalize(torch.randn(count, dim, generator=draw), dim=1))

    output = {
        "image_features": features(),
        "text_features": features(),
        "logit_scale": leaf(torch.tensor(scale)),
    }
    if kind == "siglip":
        output["logit_bias"] = leaf(torch.tensor(-3.0))
    if kind == "coca":
        labels = torch.randint(0, VOCABULARY, (count, TOKENS), generator=draw)
        labels[:1, :1] = 1  # one token at least is no padding
        logits = leaf(torch.randn(count, TOKENS, VOCABULARY, generator=draw))
        output |= {"logits": logits, "labels": labels}
    if kind == "distill":
        output |= {"dist_image_features": features(), "dist_text_features": features()}
        output["dist_logit_scale"] = leaf(torch.tensor(5.0))
    return output


def gradients_of(value, output):
    """The gradients of a scalar in every leaf, zeros where there is none."""
    leaves = [x for x in output.values() if x.requires_grad]
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
