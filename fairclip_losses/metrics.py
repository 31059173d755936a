"""Group fairness metrics on NumPy arrays, with bootstrap intervals.

Conventions that all functions share: N samples; class codes are integers 0..K-1, binary ones 0 and
1; group codes are integers from 0 with -1 for unknown, and a sample whose group is unknown counts
for no group. With more than two classes every binary notion is taken one-vs-rest and averaged over
the classes without weights. A value that does not exist is NaN, never 0.

Anything `numpy.asarray` takes is accepted, CPU tensors included; results are float64.
"""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fairclip_losses import _checks, _weighted
from fairclip_losses._weighted import FloatArray
from fairclip_losses.report import (
    AttributeReport,
    Estimate,
    FairnessReport,
    GroupReport,
    fairness_report,
)

__all__ = [
    "AttributeReport",
    "Disparity",
    "Estimate",
    "FairnessReport",
    "GroupReport",
    "accuracy",
    "between_group_disparity",
    "demographic_parity_difference",
    "equalized_odds_difference",
    "equity_scaled",
    "fairness_report",
    "group_roc_auc",
    "roc_auc",
]

UndefinedRate = Literal["zero", "skip"]


class Disparity(NamedTuple):
    """Spread of a metric between groups, relative to its overall value."""

    std: float
    range: float


def roc_auc(
    y_true: npt.ArrayLike, scores: npt.ArrayLike, sample_weight: npt.ArrayLike | None = None
) -> float:
    """Area under the ROC curve, ties counted half: P(s+ > s-) + P(s+ = s-) / 2.

    Equals scikit-learn's `roc_auc_score(..., multi_class="ovr", average="macro")`. A class that no
    sample, or every sample, belongs to has no one-vs-rest AUC and is left out of the mean.

    Args:
        y_true: class codes (N,).
        scores: binary (N,), larger for class 1; or one column per class (N, K).
        sample_weight: how often each sample counts, (N,), not negative; None: once each.

    Returns:
        The AUC; NaN, with a UserWarning, if only one class is there.

    Raises:
        ValueError: lengths that differ, no samples, scores or weights that are not finite, class
            codes that the scores have no column for.
    """
    y, s, _ = _checks.check_samples(y_true, scores)
    value = float(_weighted.macro_auc(_checks.check_weights(sample_weight, len(y)), y, s)[0])
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
    """AUC within each group (G,): entry g is `roc_auc` over the samples with group code g.

    Args:
        y_true: class codes (N,).
        scores: (N,) or (N, K), as for `roc_auc`.
        groups: group codes (N,), -1 for unknown.
        num_groups: G; None: the largest code plus one.
        sample_weight: (N,), not negative; None: ones.

    Returns:
        float64 (G,). NaN where a group is absent, and, with a UserWarning, where it is there but
        has one class only.

    Raises:
        ValueError: as for `roc_auc`, or a group code outside -1..G-1.
    """
    y, s, _ = _checks.check_samples(y_true, scores)
    g, size = _checks.check_groups(groups, len(y), num_groups)
    weights = _checks.check_weights(sample_weight, len(y))
    values: FloatArray = _weighted.group_macro_auc(weights, y, s, g, size)[0]
    for group in np.flatnonzero(np.isnan(values) & (np.bincount(g[g >= 0], minlength=size) > 0)):
        warnings.warn(
            f"group {group} holds one class only: its AUC is NaN", UserWarning, stacklevel=2
        )
    return values


def accuracy(
    y_true: npt.ArrayLike, y_pred: npt.ArrayLike, sample_weight: npt.ArrayLike | None = None
) -> float:
    """Share of the samples whose predicted class is the true one.

    Args:
        y_true: class codes (N,).
        y_pred: class codes (N,).
        sample_weight: (N,), not negative; None: ones.

    Raises:
        ValueError: lengths that differ, no samples, codes that are not integers from 0.
    """
    y, p = _checks.check_classes(y_true, y_pred, None)
    right: FloatArray = (y == p).astype(np.float64)
    return float(np.average(right, weights=_checks.check_weights(sample_weight, len(y))[0]))


def equity_scaled(overall: float, group_values: npt.ArrayLike) -> float:
    """Equity-scaled metric: ES-M = M / (1 + sum_g |M - M_g|).

    Args:
        overall: M, the metric over all samples.
        group_values: M_g, (G,); a group without a value (NaN) is left out of the sum.

    Returns:
        ES-M, at most M; NaN if M or all of the group values are NaN.

    Source: Luo et al., "FairCLIP", CVPR 2024, arXiv:2403.19949 (ES-AUC).
    """
    return float(_weighted.equity_scaled(*_overall_and_groups(overall, group_values))[0])


def between_group_disparity(overall: float, group_values: npt.ArrayLike) -> Disparity:
    """Spread of a metric between the groups, relative to its overall value M.

    (std_g(M_g) / M, (max_g M_g - min_g M_g) / M), with the population standard deviation.

    Args:
        overall: M, the metric over all samples.
        group_values: M_g, (G,); a group without a value (NaN) is left out.

    Returns:
        The pair (std, range); NaN if M is NaN or 0, or all of the group values are NaN.
    """
    std, spread = _weighted.disparities(*_overall_and_groups(overall, group_values))
    return Disparity(float(std[0]), float(spread[0]))


def demographic_parity_difference(
    y_pred: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    num_classes: int = 2,
    sample_weight: npt.ArrayLike | None = None,
) -> float:
    """Largest difference between groups in how often the positive class is predicted.

    DPD = max_g P(yhat = 1 | g) - min_g P(yhat = 1 | g), as fairlearn's function of this name; with
    `num_classes` > 2 the mean over the classes k of the same with yhat = k.

    Args:
        y_pred: predicted class codes (N,).
        groups: group codes (N,), -1 for unknown.
        num_classes: K.
        sample_weight: (N,), not negative; None: ones.

    Returns:
        A value in [0, 1]; NaN if no group is known.

    Raises:
        ValueError: lengths that differ, no samples, class codes outside 0..K-1, group codes
            below -1.
    """
    p, _ = _checks.check_classes(y_pred, y_pred, num_classes)
    g, size = _checks.check_groups(groups, len(p), None)
    weights = _checks.check_weights(sample_weight, len(p))
    rates = _weighted.group_rates(weights, p, p, g, size, num_classes)
    return float(_weighted.mean_gap(_weighted.gap(rates.selection))[0])


def equalized_odds_difference(
    y_true: npt.ArrayLike,
    y_pred: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    num_classes: int = 2,
    sample_weight: npt.ArrayLike | None = None,
    undefined_rate: UndefinedRate = "zero",
) -> float:
    """Largest difference between groups in true positive or in false positive rate.

    DEOdds = max(gap of P(yhat = 1 | y = 1, g), gap of P(yhat = 1 | y = 0, g)), a gap being the
    largest minus the smallest over the groups g: fairlearn's function of this name. With
    `num_classes` > 2 the mean over the classes of the same, one-vs-rest.

    Args:
        y_true: class codes (N,).
        y_pred: predicted class codes (N,).
        groups: group codes (N,), -1 for unknown.
        num_classes: K.
        sample_weight: (N,), not negative; None: ones.
        undefined_rate: a group without positives has no true positive rate, one without negatives
            no false positive rate. "zero" takes it for 0, as fairlearn does; "skip" leaves the
            group out of that gap, as `fairness_report` does.

    Returns:
        A value in [0, 1]; NaN if no group is known.

    Raises:
        ValueError: lengths that differ, no samples, class codes outside 0..K-1, group codes
            below -1, another `undefined_rate`.
    """
    if undefined_rate not in ("zero", "skip"):
        raise ValueError(f'expected undefined_rate "zero" or "skip", got {undefined_rate!r}')
    y, p = _checks.check_classes(y_true, y_pred, num_classes)
    g, size = _checks.check_groups(groups, len(y), None)
    rates = _weighted.group_rates(
        _checks.check_weights(sample_weight, len(y)), y, p, g, size, num_classes
    )
    positive, negative = rates.true_positive, rates.false_positive
    if undefined_rate == "zero":
        present = ~np.isnan(rates.accuracy)[:, :, None]
        positive = np.where(present & np.isnan(positive), 0.0, positive)
        negative = np.where(present & np.isnan(negative), 0.0, negative)
    return float(_weighted.mean_gap(_weighted.odds_gap(positive, negative))[0])


def _overall_and_groups(overall: float, values: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    group_values = np.asarray(values, dtype=np.float64)
    if group_values.ndim != 1:
        raise ValueError(f"expected group values (G,), got shape {group_values.shape}")
    return np.array([overall], dtype=np.float64), group_values[None]
