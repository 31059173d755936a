"""Group fairness metrics on NumPy arrays: the public functions, then the definitions they share.

Conventions: N samples; class codes are integers 0..K-1, binary ones 0 and 1; group codes are
integers from 0 with -1 for unknown, and a sample whose group is unknown counts for no group. With
more than two classes every binary notion is taken one-vs-rest and averaged over the classes without
weights. ``sample_weight`` (N,) says how often each sample counts: finite, not negative, not all 0;
None: once each. A value that does not exist is NaN, never 0; so is a gap with one group alone.
Anything `numpy.asarray` takes is accepted, and tensors of any dtype and device, which are detached;
results are float64.

The definitions, from `decide` on, take R rows of weights (R, N) and return R results, so that the
report's bootstrap is one call. Row 0 is the reference: a group that has no value in row 0 is left
out throughout; where it lacks one in another row, that row's result is NaN.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..data.groups import UNKNOWN
from ..data.tables import IntArray
from ..validation import check_choice, check_integer

FloatArray = npt.NDArray[np.float64]


class Disparity(NamedTuple):
    """Spread of a metric between groups, relative to its overall value."""

    std: float
    range: float


def roc_auc(
    y_true: npt.ArrayLike, scores: npt.ArrayLike, sample_weight: npt.ArrayLike | None = None
) -> float:
    """Area under the ROC curve, ties counted half: P(s+ > s-) + P(s+ = s-) / 2.

    ``y_true`` are class codes (N,), ``scores`` binary (N,), larger for class 1, or one column per
    class (N, K). Equals scikit-learn's `roc_auc_score(..., multi_class="ovr", average="macro")`. A
    class that no sample, or every sample, belongs to has no one-vs-rest AUC and is left out of the
    mean. NaN, with a UserWarning, if only one class is there.

    Raises:
        ValueError: lengths that differ, no samples, scores or weights that are not finite, class
            codes that the scores have no column for.
    """
    y, s, _ = check_samples(y_true, scores)
    value = float(macro_auc(_check_weights(sample_weight, len(y)), y, s)[0])
    if np.isnan(value):
        warnings.warn("one class only: the AUC is NaN", UserWarning, stacklevel=2)
    return value


def group_roc_auc(
    y_true: npt.ArrayLike,
    scores: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    num_groups: int | None = None,
    sample_weight: npt.ArrayLike | None = None,
) -> FloatArray:
    """AUC within each group, (G,): entry g is `roc_auc` over the samples with group code g.

    NaN where a group is absent, and, with a UserWarning, where it is there but has one class only.
    G is ``num_groups``; None: the largest code plus one.

    Raises:
        ValueError: as for `roc_auc`, or a group code outside -1..G-1.
    """
    y, s, _ = check_samples(y_true, scores)
    g, size = check_groups(groups, len(y), num_groups)
    values: FloatArray = group_macro_auc(_check_weights(sample_weight, len(y)), y, s, g, size)[0]
    for group in np.intersect1d(np.flatnonzero(np.isnan(values)), g):
        what = f"group {group} holds one class only: its AUC is NaN"
        warnings.warn(what, UserWarning, stacklevel=2)
    return values


def equity_scaled(overall: float, group_values: npt.ArrayLike) -> float:
    """Equity-scaled metric: ES-M = M / (1 + sum_g |M - M_g|), at most M.

    M is the metric over all samples, ``group_values`` the M_g, (G,). A group without a value (NaN)
    is left out of the sum; NaN if M or all of the group values are NaN.

    Source: Luo et al., "FairCLIP", CVPR 2024, arXiv:2403.19949 (ES-AUC).
    """
    return _spread(overall, group_values)[0]


def between_group_disparity(overall: float, group_values: npt.ArrayLike) -> Disparity:
    """Spread of a metric between the groups, relative to its overall value M.

    (std_g(M_g) / M, (max_g M_g - min_g M_g) / M), with the population standard deviation, of the
    ``group_values`` M_g, (G,). A group without a value (NaN) is left out; NaN if M is NaN or 0, or
    fewer than two of the group values are numbers: one alone has no spread.
    """
    return Disparity(*_spread(overall, group_values)[1:])


def demographic_parity_difference(
    y_pred: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    num_classes: int = 2,
    sample_weight: npt.ArrayLike | None = None,
) -> float:
    """Largest difference between groups in how often the positive class is predicted.

    DPD = max_g P(yhat = 1 | g) - min_g P(yhat = 1 | g), in [0, 1], as fairlearn's function of this
    name; with ``num_classes`` K > 2 the mean over the classes k of the same with yhat = k. NaN if
    no group is known, or, with a UserWarning, one alone (fairlearn says 0). ``y_pred`` are class
    codes, ``groups`` group codes, (N,) each.

    Raises:
        ValueError: lengths that differ, no samples, class codes outside 0..K-1, group codes
            below -1.
    """
    p = _check_codes(y_pred, "y_pred", None, 0, check_integer("num_classes", num_classes, 2))
    rates = _rates_of_several(p, p, groups, num_classes, sample_weight)
    return float(mean_gap(gap(rates.selection))[0])


def equalized_odds_difference(
    y_true: npt.ArrayLike,
    y_pred: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    num_classes: int = 2,
    sample_weight: npt.ArrayLike | None = None,
    undefined_rate: Literal["zero", "skip"] = "zero",
) -> float:
    """Largest difference between groups in true positive or in false positive rate.

    DEOdds = max(gap of P(yhat = 1 | y = 1, g), gap of P(yhat = 1 | y = 0, g)), a gap being the
    largest minus the smallest over the groups g: fairlearn's function of this name, in [0, 1]. With
    ``num_classes`` K > 2 the mean over the classes of the same, one-vs-rest. NaN if no group is
    known, or, with a UserWarning, one alone (fairlearn says 0). ``y_true`` and ``y_pred`` are class
    codes, ``groups`` group codes, (N,) each.

    A group without positives has no true positive rate, one without negatives no false positive
    rate: ``undefined_rate="zero"`` takes it for 0, as fairlearn does; "skip" leaves the group out
    of that gap, as `fairness_report` does.

    Raises:
        ValueError: as for `demographic_parity_difference`, or another ``undefined_rate``.
    """
    check_choice("undefined_rate", undefined_rate, ("zero", "skip"))
    p = _check_codes(y_pred, "y_pred", None, 0, check_integer("num_classes", num_classes, 2))
    y = _check_codes(y_true, "y_true", len(p), 0, num_classes)
    found = _rates_of_several(y, p, groups, num_classes, sample_weight)
    rates = [found.true_positive, found.false_positive]
    if undefined_rate == "zero":
        present = ~np.isnan(found.accuracy)[:, :, None]
        rates = [np.where(present & np.isnan(rate), 0.0, rate) for rate in rates]
    return float(mean_gap(odds_gap(*rates))[0])


def _rates_of_several(y: IntArray, p: IntArray, groups: Any, size: int, weights: Any) -> Rates:
    """Return `group_rates` of one row; warn where one group alone is known."""
    g, num_groups = check_groups(groups, len(p), None)
    rates = group_rates(_check_weights(weights, len(p)), y, p, g, num_groups, size)
    if len(known := np.flatnonzero(~np.isnan(rates.accuracy[0]))) == 1:
        what = f"one group alone is known, {known[0]}: there is no gap, it is NaN"
        warnings.warn(what, UserWarning, stacklevel=3)
    return rates


def decide(scores: FloatArray, threshold: float) -> IntArray:
    """Predict classes (N,): from the threshold on class 1 of two, of more the largest score's."""
    if scores.ndim == 2 and scores.shape[1] > 2:
        return np.asarray(scores.argmax(axis=1), dtype=np.int64)
    return np.asarray((scores if scores.ndim == 1 else scores[:, 1]) >= threshold, dtype=np.int64)


def _sum_by_code(weights: FloatArray, codes: IntArray, size: int) -> FloatArray:
    """Add up the weights (R, N) of the samples that share a code (N,) from 0: (R, size)."""
    known = codes >= 0
    cells = codes[known] + size * np.arange(len(weights))[:, None]
    sums = np.bincount(cells.ravel(), weights[:, known].ravel(), len(weights) * size)
    return np.asarray(sums, dtype=np.float64).reshape(len(weights), size)  # integers if empty


def _binary_auc(weights: FloatArray, positive: npt.NDArray[np.bool_], s: FloatArray) -> FloatArray:
    """AUC of one binary task, (R,)."""
    values, ranks = np.unique(s, return_inverse=True)
    positives = _sum_by_code(weights, np.where(positive, ranks, -1), len(values))
    negatives = _sum_by_code(weights, np.where(positive, -1, ranks), len(values))
    below = np.cumsum(negatives, axis=1) - negatives
    wins = (positives * (below + negatives / 2)).sum(axis=1)
    return _ratio(wins, positives.sum(axis=1) * negatives.sum(axis=1))


def macro_auc(weights: FloatArray, y_true: IntArray, scores: FloatArray) -> FloatArray:
    """AUC (R,): binary for scores (N,), for (N, K) the mean of the one-vs-rest AUCs that exist."""
    columns = enumerate(scores.T) if scores.ndim == 2 else [(1, scores)]
    tasks = [_binary_auc(weights, y_true == k, column) for k, column in columns]
    return _mean_of_known(np.stack(tasks, axis=1))


def group_macro_auc(
    weights: FloatArray, y_true: IntArray, scores: FloatArray, groups: IntArray, num_groups: int
) -> FloatArray:
    """`macro_auc` within each group: (R, G), NaN for a group that is absent."""
    values = np.full((len(weights), num_groups), np.nan)
    for group in np.unique(groups[groups >= 0]):
        rows = groups == group
        values[:, group] = macro_auc(weights[:, rows], y_true[rows], scores[rows])
    return values


class Rates(NamedTuple):
    """What a classifier decides in each group: accuracy (R, G), and per class (R, G, K) rates."""

    accuracy: FloatArray
    selection: FloatArray
    true_positive: FloatArray
    false_positive: FloatArray


def group_rates(
    weights: FloatArray,
    y_true: IntArray,
    y_pred: IntArray,
    groups: IntArray,
    num_groups: int,
    num_classes: int,
) -> Rates:
    """Count decisions by group and class, and divide; a rate over no samples is NaN."""

    def count(classes: IntArray, keep: npt.NDArray[np.bool_]) -> FloatArray:
        codes = np.where(keep, groups * num_classes + classes, -1)
        sums = _sum_by_code(weights, codes, num_groups * num_classes)
        return sums.reshape(len(weights), num_groups, num_classes)

    known, right = groups >= 0, y_true == y_pred
    actual = count(y_true, known)
    hits, false_alarms = count(y_pred, known & right), count(y_pred, known & ~right)
    # Summed, not subtracted from the total: no rounding where weights differ by orders.
    others = actual @ (1.0 - np.eye(num_classes))
    total = actual.sum(axis=2, keepdims=True)
    return Rates(
        accuracy=_ratio(hits.sum(axis=2), total[:, :, 0]),
        selection=_ratio(hits + false_alarms, np.broadcast_to(total, hits.shape)),
        true_positive=_ratio(hits, actual),
        false_positive=_ratio(false_alarms, others),
    )


def _largest(values: FloatArray) -> FloatArray:
    """Largest over axis 1 of the values that exist in row 0: (R, G, K) -> (R, K)."""
    largest = np.where(np.isnan(values[0]), -np.inf, values).max(axis=1, initial=-np.inf)
    return np.where(np.isneginf(largest), np.nan, largest)


def gap(rates: FloatArray) -> FloatArray:
    """Largest minus smallest rate over the groups: (R, G, K) -> (R, K); NaN with one group."""
    several = (~np.isnan(rates[0])).sum(axis=0) > 1
    return np.where(several, _largest(rates) + _largest(-rates), np.nan)


def odds_gap(true_positive: FloatArray, false_positive: FloatArray) -> FloatArray:
    """The larger of the two rates' gaps (R, K), or the one that exists."""
    return _largest(np.stack([gap(true_positive), gap(false_positive)], axis=1))


def mean_gap(gaps: FloatArray) -> FloatArray:
    """Average gaps (R, K) over the classes; with two, both tasks are one: take class 1's."""
    return gaps[:, 1] if gaps.shape[1] == 2 else _mean_of_known(gaps)


def group_spread(
    overall: FloatArray, group_values: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """`equity_scaled` and both of `between_group_disparity`, of (R,) and (R, G): (R,) each."""
    values, nothing = group_values[:, ~np.isnan(group_values[0])], np.full_like(overall, np.nan)
    if not values.shape[1]:
        return nothing, nothing, nothing
    scaled = overall / (1 + np.abs(overall[:, None] - values).sum(axis=1))
    if values.shape[1] == 1:
        return scaled, nothing, nothing
    return scaled, _ratio(values.std(axis=1), overall), _ratio(np.ptp(values, axis=1), overall)


def _mean_of_known(values: FloatArray) -> FloatArray:
    """Mean over the last axis of the values that are not NaN; NaN where there are none."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0.0).sum(axis=-1), known.sum(axis=-1).astype(np.float64))


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """Divide; NaN where the denominator is not above 0."""
    out = np.full_like(numerator, np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)


def as_array(values: Any, dtype: type | None = None) -> npt.NDArray[Any]:
    """Return `numpy.asarray` of values, and of tensors what they hold, wherever and however."""
    nested = (torch.Tensor, list, tuple)
    if isinstance(values, (list, tuple)) and any(isinstance(value, nested) for value in values):
        values = [as_array(value) for value in values]
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16 (and no float8); float64 holds all of them.
        values = (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values, dtype)


def check_samples(y_true: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[IntArray, FloatArray, int]:
    """Check true classes and scores against each other; return both and the number of classes."""
    s = as_array(scores, np.float64)
    if s.ndim not in (1, 2) or not len(s) or (s.ndim == 2 and s.shape[1] < 2):
        raise ValueError(f"expected scores (N,) or (N, K), N >= 1, K >= 2, got shape {s.shape}")
    if not np.isfinite(s).all():
        raise ValueError(f"expected finite scores, got {s[~np.isfinite(s)][0]}")
    num_classes = 2 if s.ndim == 1 else s.shape[1]
    return _check_codes(y_true, "y_true", len(s), 0, num_classes), s, num_classes


def check_groups(values: npt.ArrayLike, length: int, size: int | None) -> tuple[IntArray, int]:
    """Check group codes; return them and the number of groups (None: the largest code + 1)."""
    codes = _check_codes(values, "groups", length, UNKNOWN, size)
    return codes, int(codes.max()) + 1 if size is None else size


def _check_codes(
    values: npt.ArrayLike, name: str, length: int | None, lowest: int, size: int | None
) -> IntArray:
    """Return integer codes (N,) from `lowest` up to below `size`; ValueError for anything else."""
    codes = as_array(values)
    if codes.ndim != 1 or not len(codes) or (length is not None and len(codes) != length):
        expected = "(N,), N >= 1" if length is None else f"({length},)"
        raise ValueError(f"expected {name} of shape {expected}, got {codes.shape}")
    if codes.dtype != np.bool_ and not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"expected {name} as integer codes, got dtype {codes.dtype}")
    low, high = int(codes.min()), int(codes.max())
    if low < lowest or (size is not None and high >= size):
        least = f"{lowest} (unknown)" if lowest == UNKNOWN else str(lowest)
        allowed = f"of {least} or more" if size is None else f"in {lowest}..{size - 1}"
        raise ValueError(f"expected {name} {allowed}, got {low if low < lowest else high}")
    return codes.astype(np.int64)


def _check_weights(sample_weight: npt.ArrayLike | None, length: int) -> FloatArray:
    """Return the weights as one row (1, N)."""
    weights = as_array(np.ones(length) if sample_weight is None else sample_weight, np.float64)
    if weights.shape != (length,):
        raise ValueError(f"expected sample_weight of shape ({length},), got {weights.shape}")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError("expected sample_weight finite, not negative and not all 0")
    return weights[None]


def _spread(overall: float, values: npt.ArrayLike) -> list[float]:
    """Return `group_spread` of one row."""
    group_values = as_array(values, np.float64)
    if group_values.ndim != 1:
        raise ValueError(f"expected group values (G,), got shape {group_values.shape}")
    spread = group_spread(as_array([overall], np.float64), group_values[None])
    return [float(value[0]) for value in spread]
