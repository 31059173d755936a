"""Checks of values, made where they cost no wait for the device."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .options import SinkhornOptions


class ConvergenceWarning(UserWarning):
    """The Sinkhorn solver stopped before it converged."""


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """Return the shape that all broadcast to, in a tenth of the time of torch's; RuntimeError."""
    longer = [shape for shape in shapes if shape]
    if len(longer) < 2:
        return torch.Size(*longer)
    sizes = [1] * max([len(shape) for shape in longer])
    for shape in longer:
        for k, size in enumerate(shape, len(sizes) - len(shape)):
            if size != 1 and sizes[k] not in (1, size):
                raise RuntimeError(f"shapes do not broadcast: {shapes}")
            sizes[k] = sizes[k] if size == 1 else size
    return torch.Size(sizes)


@cache
def _has_triton() -> bool:
    """Whether there is a Triton of 3.2 or later: before, constants in float64 are float32's."""
    if find_spec("triton") is None:
        return False
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (3, 2)


def runs_triton(points: Tensor) -> bool:
    """Whether Triton's kernels run where the points are: on a GPU, or in Triton's interpreter."""
    here = points.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return here and _has_triton()


def is_readable(points: Tensor) -> bool:
    """Whether reading a number back waits for no device and breaks no graph of torch.compile."""
    return points.device.type == "cpu" and not torch.compiler.is_compiling()


def should_validate(tensor: Tensor, validate: bool | None) -> bool:
    """Resolve ``validate``: None looks at values on the CPU, outside torch.compile."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" if validate is None else validate


def within(values: Tensor, low: float) -> bool:
    """Whether all values are finite and at least ``low``, in one pass over them."""
    if values.numel() == 0:
        return True
    least, most = (float(end) for end in torch.aminmax(values.detach()))
    return least >= low and -math.inf < least and most < math.inf  # False for NaN


def check_weights(weights: Tensor | None, name: str) -> None:
    """Refuse negative, NaN and infinite weights."""
    if weights is None or within(weights, 0.0):
        return
    bad = ~(torch.isfinite(weights) & (weights >= 0))
    if bool(bad.any()):
        raise ValueError(
            f"weights {name} must be finite and >= 0, got {float(weights[bad][0])} "
            f"({int(bad.sum())} such of {weights.numel()})"
        )


def check_finite(points: Tensor, weights: Sequence[Tensor | None], name: str) -> Tensor:
    """Refuse NaN and infinite points that a row of any weights uses; return the absent as 0."""
    if math.isfinite(points.detach().sum()):  # one pass; an overflow is looked at again
        return points
    bad = ~torch.isfinite(points).all(-1)
    used = torch.zeros_like(bad)
    for some in weights:
        used = used | (bad if some is None else bad & (some > 0))
    if bool(used.any()):
        raise ValueError(
            f"{name} must be finite where it has weight, got NaN or infinity at "
            f"{int(used.sum())} of {used.numel()} points"
        )
    return torch.where(bad[..., None], 0.0, points)


def warn_unconverged(error: float, options: SinkhornOptions, rounds: int) -> None:
    """Say that the solver stopped before the marginals were met to ``tol``."""
    warnings.warn(
        f"the Sinkhorn solver stopped after {rounds} rounds with an L1 error of the marginals of "
        f"{error:.1e}, above tol = {options.tol:.1e}, at blur = {options.blur:g}: take a larger "
        "blur, or raise max_iterations or tol",
        ConvergenceWarning,
        stacklevel=2,
    )


class _OnceDifferentiable(torch.autograd.Function):
    """Identity on a gradient that refuses to be differentiated, instead of passing as constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, source: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "sinkhorn_divergence is once differentiable: its envelope gradient has no derivative"
        )


def refuse_second(grads: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> list[Any]:
    """Guard the gradients found under ``create_graph=True``."""
    if not torch.is_grad_enabled():
        return list(grads)
    return [
        None if grad is None else _OnceDifferentiable.apply(grad, source)
        for grad, source in zip(grads, sources, strict=True)
    ]
