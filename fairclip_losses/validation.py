"""Checks of options: the right type and range, or a ValueError that says what was expected.

Each part checks its options in the constructor and its tensors at the public edge, by these, and
never again below.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "all_at_least",
    "check_choice",
    "check_finite_number",
    "check_integer",
    "check_pair_rows",
    "check_same_shape",
    "check_share",
    "check_sigma",
    "is_number",
    "should_validate",
]

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


def should_validate(tensor: Tensor, validate: bool | None) -> bool:
    """Resolve ``validate``: None looks at values on the CPU, outside torch.compile."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" if validate is None else validate


def all_at_least(values: Tensor, low: float) -> bool:
    """Whether all values are finite and at least ``low``, in one pass over them."""
    if values.numel() == 0:
        return True
    least, most = (float(end) for end in torch.aminmax(values.detach()))
    return least >= low and -math.inf < least and most < math.inf  # False for NaN
