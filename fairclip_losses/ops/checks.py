"""Checks of values, made where they cost no wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def broadcast_shapes(*shapes: torch.Size) -> torch.Size:
    """Typed `torch.broadcast_shapes`."""
    shape: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return shape


def should_validate(tensor: Tensor, validate: bool | None) -> bool:
    """Resolve ``validate``: None looks at values on the CPU, outside torch.compile."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" if validate is None else validate


def check_weights(weights: Tensor | None, name: str) -> None:
    """Refuse negative, NaN and infinite weights."""
    if weights is None:
        return
    bad = ~(torch.isfinite(weights) & (weights >= 0))
    if bool(bad.any()):
        raise ValueError(
            f"weights {name} must be finite and >= 0, got {float(weights[bad][0])} "
            f"({int(bad.sum())} such of {weights.numel()})"
        )


def check_finite(points: Tensor, weights: Tensor | None, name: str) -> Tensor:
    """Refuse NaN and infinite points that any row gives weight; return the absent ones as 0."""
    bad = ~torch.isfinite(points).all(-1)
    if not bool(bad.any()):
        return points
    weighted = torch.ones_like(bad) if weights is None else weights > 0
    used = bad & weighted
    if bool(used.any()):
        raise ValueError(
            f"{name} must be finite where it has weight, got NaN or infinity at "
            f"{int(used.sum())} of {used.numel()} points"
        )
    return torch.where(bad[..., None], 0.0, points)
