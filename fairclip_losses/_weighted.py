"""The sums behind the metrics, for many weightings of the same N samples at once.

A weight row (N,) says how often each sample counts: ones for the sample itself, a user's weights,
or the counts of a bootstrap resample. Everything here takes R such rows and returns R results; a
result is NaN where its definition divides by nothing. Row 0 is the reference: a group that has no
value in row 0 is left out throughout; where it lacks one in another row, that row's result is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def decide(scores: FloatArray, threshold: float) -> IntArray:
    """Predict classes (N,): from the threshold on class 1 of two, of more the largest score's."""
    if scores.ndim == 2 and scores.shape[1] > 2:
        return np.asarray(scores.argmax(axis=1), dtype=np.int64)
    positive = scores if scores.ndim == 1 else scores[:, 1]
    return np.asarray(positive >= threshold, dtype=np.int64)


def sum_by_code(weights: FloatArray, codes: IntArray, size: int) -> FloatArray:
    """Add up the weights (R, N) of the samples that share a code (N,): (R, size).

    Samples with a negative code are left out. Sorting by code makes every sum a slice.
    """
    order = np.argsort(codes, kind="stable")
    order = order[np.searchsorted(codes[order], 0) :]
    present, starts = np.unique(codes[order], return_index=True)
    sums = np.zeros((len(weights), size))
    if len(present):
        sums[:, present] = np.add.reduceat(weights[:, order], starts, axis=1)
    return sums


def auc(weights: FloatArray, positive: npt.NDArray[np.bool_], scores: FloatArray) -> FloatArray:
    """Area under the ROC curve of one binary task: P(s+ > s-) + P(s+ = s-) / 2, (R,)."""
    values, ranks = np.unique(scores, return_inverse=True)
    positives = sum_by_code(weights, np.where(positive, ranks, -1), len(values))
    negatives = sum_by_code(weights, np.where(positive, -1, ranks), len(values))
    below = np.cumsum(negatives, axis=1) - negatives
    wins = (positives * (below + negatives / 2)).sum(axis=1)
    return ratio(wins, positives.sum(axis=1) * negatives.sum(axis=1))


def macro_auc(weights: FloatArray, y_true: IntArray, scores: FloatArray) -> FloatArray:
    """AUC (R,): binary for scores (N,), for (N, K) the mean of the one-vs-rest AUCs that exist."""
    if scores.ndim == 1:
        return auc(weights, y_true == 1, scores)
    tasks = [auc(weights, y_true == k, scores[:, k]) for k in range(scores.shape[1])]
    return mean_of_known(np.stack(tasks, axis=1))


def group_macro_auc(
    weights: FloatArray, y_true: IntArray, scores: FloatArray, groups: IntArray, num_groups: int
) -> FloatArray:
    """`macro_auc` within each group: (R, G), NaN for a group that is absent."""
    values = np.full((len(weights), num_groups), np.nan)
    for group in range(num_groups):
        rows = np.flatnonzero(groups == group)
        if len(rows):
            values[:, group] = macro_auc(weights[:, rows], y_true[rows], scores[rows])
    return values


@dataclass(frozen=True)
class Rates:
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
        sums = sum_by_code(weights, codes, num_groups * num_classes)
        return sums.reshape(len(weights), num_groups, num_classes)

    known, right = groups >= 0, y_true == y_pred
    actual = count(y_true, known)
    hits, false_alarms = count(y_pred, known & right), count(y_pred, known & ~right)
    # Summed, not subtracted from the total: no rounding where weights differ by orders.
    others = actual @ (1.0 - np.eye(num_classes))
    total = actual.sum(axis=2, keepdims=True)
    return Rates(
        accuracy=ratio(hits.sum(axis=2), total[:, :, 0]),
        selection=ratio(hits + false_alarms, np.broadcast_to(total, hits.shape)),
        true_positive=ratio(hits, actual),
        false_positive=ratio(false_alarms, others),
    )


def gap(rates: FloatArray) -> FloatArray:
    """Largest minus smallest rate over the groups: (R, G, K) -> (R, K)."""
    known = ~np.isnan(rates[0])
    largest = np.where(known, rates, -np.inf).max(axis=1, initial=-np.inf)
    smallest = np.where(known, rates, np.inf).min(axis=1, initial=np.inf)
    return np.where(known.any(axis=0), largest - smallest, np.nan)


def odds_gap(true_positive: FloatArray, false_positive: FloatArray) -> FloatArray:
    """The larger of the two rates' gaps, of the one that exists where the other does not."""
    positive, negative = gap(true_positive), gap(false_positive)
    larger = np.maximum(positive, negative)
    larger = np.where(np.isnan(negative[0]), positive, larger)
    return np.where(np.isnan(positive[0]), negative, larger)


def mean_gap(gaps: FloatArray) -> FloatArray:
    """Average gaps (R, K) over the classes; with two, both tasks are one: take class 1's."""
    return gaps[:, 1] if gaps.shape[1] == 2 else mean_of_known(gaps)


def equity_scaled(overall: FloatArray, group_values: FloatArray) -> FloatArray:
    """M / (1 + sum_g |M - M_g|) for overall (R,) and group values (R, G): (R,)."""
    values = group_values[:, ~np.isnan(group_values[0])]
    scaled = overall / (1 + np.abs(overall[:, None] - values).sum(axis=1))
    return scaled if values.shape[1] else np.full_like(overall, np.nan)


def disparities(overall: FloatArray, group_values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Population std and range of the group values (R, G), each over the overall value (R,)."""
    values = group_values[:, ~np.isnan(group_values[0])]
    if not values.shape[1]:
        return np.full_like(overall, np.nan), np.full_like(overall, np.nan)
    spread = values.max(axis=1) - values.min(axis=1)
    return ratio(values.std(axis=1), overall), ratio(spread, overall)


def mean_of_known(values: FloatArray) -> FloatArray:
    """Mean over the last axis of the values that are not NaN; NaN where there are none."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0.0).sum(axis=-1), known.sum(axis=-1).astype(np.float64))


def ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """Divide; NaN where the denominator is not above 0."""
    out = np.full_like(numerator, np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)
