"""From tensors on the CPU to NumPy's arrays: checked, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...options import _refuse_bad_points as check_finite
from ...options import _refuse_bad_weights as check_weights
from ..arrays import Array, Shape

# Points above which squares come near the end of float64.
HUGE = 1e100
_PLAIN = (Tensor, torch.nn.Parameter)
_NUMPY_FLOATS = (torch.float32, torch.float64)


def suits_host(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> bool:
    """Whether the problem is NumPy's: on the CPU, uncompiled, without gradients in the weights."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and (
        (a is not None and a.requires_grad) or (b is not None and b.requires_grad)
    ):
        return False
    for tensor in (x, y, a, b):
        if tensor is not None and not (tensor.is_cpu and type(tensor) in _PLAIN):
            return False
    return True


class Weights(NamedTuple):
    """Weights as they came (None: all equal), and the sums of their rows."""

    values: Array | None
    total: Array  # (*,)
    complete: bool  # no row is without mass
    full: bool  # no point is without

    def scale(self) -> Array:
        """Return what makes the rows sum to one, (*,); 0 for a row without mass."""
        if self.complete:
            return 1.0 / self.total
        positive = self.total > 0
        return positive / np.where(positive, self.total, 1.0)


_UNIFORM = Weights(None, np.ones(()), True, True)


def read_points(
    points: Tensor, weights: Sequence[Tensor | None], name: str, validate: bool
) -> tuple[Array, bool]:
    """Return points (*, N) in float64 and whether any is huge; absent ones that are become 0."""
    line = points.detach()
    array = _to_array(line)[..., 0].astype(np.float64, copy=False)
    if _squares_fit(array):
        return array, False
    used = _used(weights, line.shape[-2])
    if validate:
        array = _to_array(check_finite(line, [used], name))[..., 0].astype(np.float64, copy=False)
    if used is not None:
        array = np.where(used.numpy() > 0, array, 0.0)
    return array, not _squares_fit(array)


def _squares_fit(array: Array) -> bool:
    """Whether all values are finite and far from where float64 ends, in one pass."""
    line = array.reshape(-1)
    return bool(line.dot(line) < HUGE * HUGE)


def _to_array(tensor: Tensor) -> Array:
    """Return the values in a type that NumPy has; nothing is copied if theirs is one."""
    return (tensor if tensor.dtype in _NUMPY_FLOATS else tensor.float()).numpy()


def _used(weights: Sequence[Tensor | None], count: int) -> Tensor | None:
    """Return weights that are positive where any are, None where all points count."""
    if any(w is None for w in weights):
        return None
    seen = [(w.detach() > 0).reshape(-1, count).any(0) for w in weights if w is not None]
    return torch.stack(seen).any(0).double()


def read_weights(weights: Tensor | None, name: str, validate: bool) -> Weights:
    """Return weights (*, N) and the sums of their rows."""
    if weights is None:
        return _UNIFORM
    weights = weights.detach()
    array = _to_array(weights)
    if array.size == 0:
        return Weights(array, np.zeros(array.shape[:-1]), False, True)
    total = np.add.reduce(array, -1, dtype=np.float64)
    least = np.minimum.reduce(array, axis=None)
    if not (least >= 0 and _squares_fit(total)):
        if validate:
            check_weights(weights, name)
        array = array.astype(np.float64)
        array /= np.maximum(array.max(-1, keepdims=True), np.finfo(np.float64).tiny)
        total = np.add.reduce(array, -1)
    complete = np.count_nonzero(total) == total.size
    return Weights(array, total, complete, complete and bool(least > 0))


def both_have_mass(a: Weights, b: Weights, lead: Shape) -> Array:
    """Return which problems have two measures, (*lead)."""
    return np.broadcast_to((a.total > 0) & (b.total > 0), lead)


def to_tensor(array: Array, dtype: torch.dtype) -> Tensor:
    """Return the values as a tensor."""
    if dtype == torch.float32:  # NumPy converts a short array in half the time
        return torch.from_numpy(array.astype(np.float32))
    return torch.from_numpy(array).to(dtype)
