"""From tensors on the CPU to NumPy's arrays: checked, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import check_finite, check_weights
from .arrays import Array, Shape

# Points above which squares come near the end of float64.
HUGE = 1e100
_NUMPY_FLOATS = (torch.float32, torch.float64)
_ONE = np.ones(())


def suits_host(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> bool:
    """Whether the problem is NumPy's: on the CPU, uncompiled, without gradients in the weights."""
    if torch.compiler.is_compiling():
        return False
    weighted = torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in (a, b))
    return not weighted and all(
        t is None or (t.is_cpu and type(t) in (Tensor, torch.nn.Parameter)) for t in (x, y, a, b)
    )


class Weights(NamedTuple):
    """Weights as they came (None: all equal), and 1 / their sums, 0 for a row without mass."""

    values: Array | None
    scale: Array  # (*,)
    complete: bool  # no row is without any
    full: bool  # no point is without


def read_points(
    points: Tensor, weights: Sequence[Tensor | None], name: str, validate: bool
) -> tuple[Array, float]:
    """Return points (*, N) in float64 and the largest; absent ones that are huge become 0."""
    line = points.detach()
    array = line.double().numpy()[..., 0]
    largest = np.maximum.reduce(np.abs(array), axis=None)
    if not largest < HUGE:
        used = _used(weights, line.shape[-2])
        if validate:
            line = check_finite(line, used, name)
        array = line.double().numpy()[..., 0]
        if used is not None:
            array = np.where(used.numpy() > 0, array, 0.0)
        largest = np.maximum.reduce(np.abs(array), axis=None)
    return array, largest


def _used(weights: Sequence[Tensor | None], count: int) -> Tensor | None:
    """Return weights that are positive where any are, None where all points count."""
    if any(w is None for w in weights):
        return None
    seen = [(w.detach() > 0).reshape(-1, count).any(0) for w in weights if w is not None]
    return torch.stack(seen).any(0).double()


def read_weights(weights: Tensor | None, name: str, validate: bool) -> Weights:
    """Return weights (*, N) and what makes their rows sum to one."""
    if weights is None:
        return Weights(None, _ONE, True, True)
    weights = weights.detach()
    array = weights.numpy() if weights.dtype in _NUMPY_FLOATS else weights.float().numpy()
    if array.size == 0:
        return Weights(array, np.zeros(array.shape[:-1]), False, True)
    total = np.add.reduce(array, -1, dtype=np.float64)
    least = np.minimum.reduce(array, axis=None)
    if not (least >= 0 and np.maximum.reduce(total, axis=None) < np.inf):
        if validate:
            check_weights(weights, name)
        array = array.astype(np.float64)
        array /= np.maximum(array.max(-1, keepdims=True), np.finfo(np.float64).tiny)
        total = np.add.reduce(array, -1)
    positive = total > 0
    if not np.logical_and.reduce(positive, axis=None):
        return Weights(array, positive / np.where(positive, total, 1.0), False, False)
    return Weights(array, 1.0 / total, True, bool(least > 0))


def both_have_mass(a: Weights, b: Weights, lead: Shape) -> Array | bool:
    """Return which problems have two measures, (*lead); True for all of them."""
    if a.complete and b.complete:
        return True
    return np.broadcast_to((a.scale > 0) & (b.scale > 0), lead)
