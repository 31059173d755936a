"""Checks of what the metrics are given: one ValueError that says what was expected and came."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fairclip_losses._weighted import FloatArray, IntArray
from fairclip_losses.data.groups import UNKNOWN


def check_samples(y_true: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[IntArray, FloatArray, int]:
    """Check true classes and scores against each other; return both and the number of classes."""
    s = np.asarray(scores, dtype=np.float64)
    if s.ndim not in (1, 2) or not len(s) or (s.ndim == 2 and s.shape[1] < 2):
        raise ValueError(f"expected scores (N,) or (N, K), N >= 1, K >= 2, got shape {s.shape}")
    if not np.isfinite(s).all():
        raise ValueError(f"expected finite scores, got {s[~np.isfinite(s)][0]}")
    num_classes = 2 if s.ndim == 1 else s.shape[1]
    y = _codes(y_true, "y_true", len(s), 0, num_classes)
    return y, s, num_classes


def check_classes(
    y_true: npt.ArrayLike, y_pred: npt.ArrayLike, num_classes: int | None
) -> tuple[IntArray, IntArray]:
    """Check true and predicted classes against each other; None: any number of classes."""
    if num_classes is not None and num_classes < 2:
        raise ValueError(f"expected num_classes of 2 or more, got {num_classes}")
    p = _codes(y_pred, "y_pred", None, 0, num_classes)
    return _codes(y_true, "y_true", len(p), 0, num_classes), p


def check_groups(values: npt.ArrayLike, length: int, size: int | None) -> tuple[IntArray, int]:
    """Check group codes; return them and the number of groups (None: the largest code + 1)."""
    codes = _codes(values, "groups", length, UNKNOWN, size)
    return codes, int(codes.max()) + 1 if size is None else size


def _codes(
    values: npt.ArrayLike, name: str, length: int | None, lowest: int, size: int | None
) -> IntArray:
    """Return integer codes (N,) from `lowest` up to below `size`; ValueError for anything else."""
    codes = np.asarray(values)
    if codes.ndim != 1 or not len(codes) or (length is not None and len(codes) != length):
        expected = "(N,), N >= 1" if length is None else f"({length},)"
        raise ValueError(f"expected {name} of shape {expected}, got {codes.shape}")
    if codes.dtype == np.bool_:
        codes = codes.astype(np.int64)
    if not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"expected {name} as integer codes, got dtype {codes.dtype}")
    low, high = int(codes.min()), int(codes.max())
    if low < lowest or (size is not None and high >= size):
        wrong = low if low < lowest else high
        if size is not None:
            raise ValueError(f"expected {name} in {lowest}..{size - 1}, got {wrong}")
        least = f"{lowest} (unknown)" if lowest == UNKNOWN else str(lowest)
        raise ValueError(f"expected {name} of {least} or more, got {wrong}")
    return codes.astype(np.int64)


def check_weights(sample_weight: npt.ArrayLike | None, length: int) -> FloatArray:
    """Return the weights as one row (1, N)."""
    if sample_weight is None:
        return np.ones((1, length))
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (length,):
        raise ValueError(f"expected sample_weight of shape ({length},), got {weights.shape}")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError("expected sample_weight finite, not negative and not all 0")
    return weights[None]
