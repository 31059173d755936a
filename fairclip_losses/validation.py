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
    "is_number",
    "should_validate",
]


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
