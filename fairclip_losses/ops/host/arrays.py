"""NumPy's arrays with leading dimensions that broadcast, and the type of a solution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
# Takes the gradient of the costs (*,), returns those of the points x (*, N) and y (*, M).
Gradients = Callable[[Array], tuple[Array, Array]]
# Largest exponent of a number, beyond which exponents are cut off.
LARGEST = 700.0
# Points times rows from which on what is absent is left out before anything is read in order.
FEW = 2**16
# Points of both measures times rows up to which p = 2 looks at all of them, where some are absent.
FEW_STEPS = 2**13


class HostSolution(NamedTuple):
    """Costs (*,) in float64 and what makes gradients of theirs."""

    cost: Array
    gradients: Gradients


def along(values: Array, order: Array) -> Array:
    """Read values (*, K) at places (*, N); leading dims broadcast."""
    if order.ndim == 1:
        return values.take(order, -1)
    lead = np.broadcast_shapes(values.shape[:-1], order.shape[:-1])
    values = stretch(values, lead)
    return values.take(order + starts(values))


def starts(array: Array) -> Array:
    """Return where among all of the entries each row begins, (*, 1)."""
    return np.arange(0, array.size, array.shape[-1]).reshape(*array.shape[:-1], 1)


def stretch(array: Array, lead: Shape) -> Array:
    """Broadcast the leading dimensions."""
    if array.shape[:-1] == lead:
        return array
    return np.broadcast_to(array, (*lead, array.shape[-1]))


def sum_to(array: Array, shape: Shape) -> Array:
    """Sum over the dimensions that broadcasting added or stretched."""
    if array.shape == shape:
        return array
    summed: Array = torch.from_numpy(array).sum_to_size(shape).numpy()
    return summed
