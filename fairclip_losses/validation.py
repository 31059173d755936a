"""Checks of options: the right type and range, or a ValueError that says what was expected.

Each part checks its options in the constructor and its tensors at the public edge, by these, and
never again below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_INTEGERS = frozenset(
    {torch.int64, torch.int32, torch.int16, torch.int8}
    | {torch.uint8, torch.uint16, torch.uint32}  # uint64 does not fit into int64
)


def is_number(value: object) -> bool:
    """Whether a value is a real number of Python or NumPy; booleans are none."""
    number = isinstance(value, (int, float, np.integer, np.floating))
    return number and not isinstance(value, bool)


def check_integer(name: str, value: int, least: int) -> int:
    """Return the value as an int; refuse one that is no integer or lies below ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be an integer of {least} or more, got {value!r}")
    return int(value)


def check_finite_number(name: str, value: float) -> float:
    """Return the value as a float; refuse one that is no number, negative or not finite."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return float(value)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_sigma(name: str, value: float) -> None:
    """Refuse a number of standard deviations that is no number, negative or NaN."""
    if not is_number(value) or not value >= 0:
        raise ValueError(f"{name} must be a number of 0 or more (infinity = never), got {value!r}")


def check_limit(name: str, value: float) -> float:
    """Return a bound of a gradient; refuse one that is no number, negative or NaN."""
    if not is_number(value) or not value >= 0:
        raise ValueError(f"{name} must be a number of 0 or more (infinity = none), got {value!r}")
    return float(value)


def check_share(name: str, value: float) -> None:
    """Refuse a value that is no number in (0, 1]."""
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a number in (0, 1], got {value!r}")


def check_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse two tensors of different shapes."""
    if value.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have one shape, "
            f"got {tuple(value.shape)} and {tuple(other.shape)}"
        )


def check_pair_rows(pair_losses: Tensor, pair_ids: Tensor) -> None:
    """Refuse losses and ids that are not a floating-point and an integer tensor, both (B,)."""
    for name, value in (("pair_losses", pair_losses), ("pair_ids", pair_ids)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    if not pair_losses.is_floating_point():
        raise ValueError(f"pair_losses must be floating point, got {pair_losses.dtype}")
    if pair_ids.dtype not in _INTEGERS:
        raise ValueError(f"pair_ids must be integers (int64), got {pair_ids.dtype}")
    if pair_losses.ndim != 1 or pair_ids.ndim != 1 or len(pair_losses) != len(pair_ids):
        raise ValueError(
            "pair_losses and pair_ids must both have shape (B,), "
            f"got {tuple(pair_losses.shape)} and {tuple(pair_ids.shape)}"
        )


# Devices on which a value is read without waiting for work in their queue.
READABLE_DEVICES = frozenset({"cpu"})


def is_readable(tensor: Tensor) -> bool:
    """Whether reading a value waits for no device and breaks no graph of torch.compile."""
    return tensor.device.type in READABLE_DEVICES and not torch.compiler.is_compiling()


def should_validate(tensor: Tensor, validate: bool | None) -> bool:
    """Resolve ``validate``: None looks at values on the CPU; in a graph nobody does."""
    if validate is None or torch.compiler.is_compiling():
        return is_readable(tensor)
    return validate


def all_at_least(values: Tensor, low: float) -> bool:
    """Whether all values are finite and at least ``low``, in one pass over them."""
    if values.numel() == 0:
        return True
    least, most = (float(end) for end in torch.aminmax(values.detach()))
    return least >= low and -math.inf < least and most < math.inf  # False for NaN


def check_cost(p: int, blur: float) -> None:
    """Refuse a power or a blur that the divergence does not have."""
    if not is_number(p) or p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p!r}")
    check_finite_number("blur", blur)
    if blur != 0 and not 1e-100 <= float(blur) <= 1e100:  # blur^p must be a number too
        raise ValueError(f"blur must be 0 or from 1e-100 to 1e100, got {blur!r}")


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


def check_measures(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> None:
    """Refuse points (*, N, D), (*, M, D) and weights (*, N), (*, M) that do not fit together."""
    leads = []
    for name, points in (("x", x), ("y", y)):
        if not isinstance(points, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(points).__name__}")
        if not points.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {points.dtype}")
        if points.dim() < 2:
            raise ValueError(
                f"{name} must have shape (*, N, D), got {tuple(points.shape)}; "
                f"scores (N,) on a line are {name}[:, None]"
            )
        leads.append(points.shape[:-2])
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x and y must share their dimension D, got {x.shape[-1]} and {y.shape[-1]}"
        )
    for name, weights, count in (("a", a, x.shape[-2]), ("b", b, y.shape[-2])):
        if weights is None:
            continue
        if not weights.is_floating_point():
            raise ValueError(f"weights {name} must be floating point, got {weights.dtype}")
        if weights.dim() < 1 or weights.shape[-1] != count:
            shape = tuple(weights.shape)
            raise ValueError(f"weights {name} must have shape (*, {count}), got {shape}")
        leads.append(weights.shape[:-1])
    try:
        broadcast_shapes(*leads)
    except RuntimeError:
        shown = ", ".join(str(tuple(lead)) for lead in leads)
        raise ValueError(f"leading dimensions do not broadcast: {shown}") from None


def check_measure_values(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, validate: bool | None
) -> None:
    """Refuse points and weights that are no numbers, where asked for; absent points may be any."""
    if not should_validate(x, validate):
        return
    for name, weights in (("a", a), ("b", b)):
        if weights is not None and not all_at_least(weights, 0.0):
            bad = ~(torch.isfinite(weights) & (weights >= 0))
            raise ValueError(
                f"weights {name} must be finite and >= 0, got {float(weights[bad][0])} "
                f"({int(bad.sum())} such of {weights.numel()})"
            )
    _refuse_bad_points(x, [a, b] if x is y else [a], "x")
    if y is not x:
        _refuse_bad_points(y, [b], "y")


def _refuse_bad_points(points: Tensor, weights: Sequence[Tensor | None], name: str) -> None:
    """Refuse NaN and infinite points that a row of any weights uses."""
    if math.isfinite(points.detach().sum()):  # one pass; an overflow is looked at again
        return
    bad = ~torch.isfinite(points).all(-1)
    used = torch.zeros_like(bad)
    for some in weights:
        used = used | (bad if some is None else bad & (some > 0))
    if bool(used.any()):
        raise ValueError(
            f"{name} must be finite where it has weight, got NaN or infinity at "
            f"{int(used.sum())} of {used.numel()} points"
        )


class _OnceDifferentiable(torch.autograd.Function):
    """Identity on a gradient that refuses to be differentiated, instead of passing as constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, source: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        raise RuntimeError(f"{ctx.name} is once differentiable: its gradient has no derivative")


def refuse_second(
    name: str, grads: Sequence[Tensor | None], sources: Sequence[Tensor | None]
) -> list[Any]:
    """Guard the gradients in ``sources`` that a backward pass found, under ``create_graph=True``.

    Unlike torch's `once_differentiable` also where the incoming gradient is a constant.
    """
    if not torch.is_grad_enabled():
        return list(grads)
    return [
        None if grad is None or source is None else _OnceDifferentiable.apply(grad, source, name)
        for grad, source in zip(grads, sources, strict=True)
    ]
