"""The fairness report: every group metric of one set of predictions, with bootstrap intervals.

y_true, scores, groups -> fairness_report -> FairnessReport -> to_dict, to_rows, table
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.groups import CodeBook, group_remark, shortened
from ..data.tables import IntArray
from ..validation import check_integer
from . import group_metrics as metrics
from .group_metrics import FloatArray

# Weights of one block of resamples: 32 MB, and as much for every temporary made of them.
BLOCK_SIZE = 2**22

Row = dict[str, str | int | float | None]


@dataclass(frozen=True)
class Estimate:
    """A metric's value on the sample and its bootstrap interval; NaN where there is none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f"  [{self.low:.3f}, {self.high:.3f}]"
        return "  n/a" if math.isnan(self.value) else f"{self.value:.3f}{interval}"


@dataclass(frozen=True)
class GroupReport:
    """One group of an attribute: its label, its number of samples, its AUC and accuracy."""

    label: str
    count: int
    auc: Estimate
    accuracy: Estimate


@dataclass(frozen=True)
class AttributeReport:
    """One protected attribute: its groups, how many samples have none, and the gaps between them.

    `auc_std_disparity` and `auc_range_disparity` are the two between-group disparities of the AUC.
    """

    groups: tuple[GroupReport, ...]
    unknown: int
    es_auc: Estimate
    es_accuracy: Estimate
    demographic_parity_difference: Estimate
    equalized_odds_difference: Estimate
    auc_std_disparity: Estimate
    auc_range_disparity: Estimate


_LEVELS = {"auc": "AUC", "accuracy": "accuracy"}
_GAPS = {
    "es_auc": "ES-AUC",
    "es_accuracy": "ES-accuracy",
    "demographic_parity_difference": "demographic parity diff.",
    "equalized_odds_difference": "equalized odds diff.",
    "auc_std_disparity": "AUC disparity (std)",
    "auc_range_disparity": "AUC disparity (range)",
}


@dataclass(frozen=True)
class FairnessReport:
    """Overall metrics, and one `AttributeReport` for each protected attribute by name.

    `num_samples` and `num_classes` say what was measured, `threshold` where a binary score counts
    as positive (None with more classes, where the largest score decides); `num_bootstrap`,
    `confidence` and `seed` how the intervals were drawn.
    """

    num_samples: int
    num_classes: int
    threshold: float | None
    num_bootstrap: int
    confidence: float
    seed: int
    auc: Estimate
    accuracy: Estimate
    attributes: Mapping[str, AttributeReport]

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts and lists as JSON takes them; NaN becomes None."""
        return dict(json.loads(json.dumps(asdict(self)), parse_constant=lambda nan: None))

    def to_rows(self) -> list[Row]:
        """Return one flat row per number: attribute, group, metric, value, low, high, count.

        `attribute` and `group` are "" where the number is of all samples, or of all groups; `count`
        is the number of samples behind it. NaN becomes None.
        """
        header = ("attribute", "group", "metric", "value", "low", "high", "count")
        return [
            dict(zip(header, (*names, *numbers, count), strict=True))
            for *names, estimate, count in self._numbers()
            for numbers in [[None if math.isnan(x) else x for x in astuple(estimate)]]
        ]

    def table(self) -> str:
        """Return a text table for people, without a final line end."""
        task = "binary" if self.num_classes == 2 else f"{self.num_classes} classes, one-vs-rest"
        head = f"{self.num_samples} samples, {task}"
        if self.num_bootstrap:
            head += f"; [{100 * self.confidence:g} % interval, {self.num_bootstrap} resamples]"
        lines, section = [], ""
        for attribute, group, metric, estimate, count in self._numbers():
            if attribute != section:
                unknown = self.attributes[attribute].unknown
                lines += [("", "", ""), (attribute, f"{unknown} unknown" if unknown else "", "")]
                section = attribute
            title = ("  " if attribute else "") + (_GAPS.get(metric) or _LEVELS[metric])
            note = (f", {group}", f"n={count}") if group else ("", "")
            lines.append((title + note[0], str(estimate), note[1]))
        first, second, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
        body = [f"{a:<{first}}  {b:<{second}}  {c}".rstrip() for a, b, c in lines]
        return "\n".join([head, "", *body])

    def _numbers(self) -> Iterator[tuple[str, str, str, Estimate, int]]:
        """Yield attribute, group, metric, estimate and count of every number, in reading order."""
        for metric in _LEVELS:
            yield "", "", metric, getattr(self, metric), self.num_samples
        for name, attribute in self.attributes.items():
            known = self.num_samples - attribute.unknown
            for metric in _GAPS:
                yield name, "", metric, getattr(attribute, metric), known
            for metric in _LEVELS:
                for group in attribute.groups:
                    yield name, group.label, metric, getattr(group, metric), group.count


def fairness_report(
    y_true: npt.ArrayLike,
    scores: npt.ArrayLike,
    groups: Mapping[str, npt.ArrayLike],
    *,
    labels: CodeBook | Mapping[str, Sequence[str]] | None = None,
    threshold: float = 0.5,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> FairnessReport:
    """All metrics of this package for one set of predictions, with bootstrap intervals.

    The predicted class is ``scores >= threshold`` with two classes, the largest score with more. An
    interval is the percentile interval over ``n_bootstrap`` resamples of the N samples with
    replacement; a resample in which a metric does not exist is left out of that metric's interval.
    A gap between groups is never negative and resampling adds noise to it, so the intervals of the
    gaps lie high: with small groups the value itself can fall below its interval.

    Args:
        y_true: class codes (N,).
        scores: probabilities of class 1, (N,); or of every class, (N, K): of two column 1 counts.
        groups: attribute name -> group codes (N,); -1, unknown, counts in the overall numbers only.
        labels: attribute name -> name of each group, with samples or without; None: the codes.
        threshold: from which score on a binary sample is predicted positive.
        n_bootstrap: number of resamples; 0 for no intervals (NaN).
        confidence: coverage of the intervals, between 0 and 1.
        seed: of the resampling; the same seed gives the same intervals.

    An attribute of which one group alone has samples has no gaps and no equity-scaled metrics: NaN,
    with a UserWarning. A group that has samples of one class only has AUC NaN, with a UserWarning,
    and is left out of the equity-scaled AUC and the disparities; a group without positives
    (negatives) is left out of the true (false) positive rates' gap.

    Raises:
        ValueError: as for `roc_auc`, groups that are no mapping, group codes out of range, an
            attribute without labels, or a setting out of range.
    """
    y, s, num_classes = metrics.check_samples(y_true, scores)
    s = s[:, 1] if s.shape[1:] == (2,) else s
    threshold = float(metrics.as_array(threshold))
    check_settings(threshold, n_bootstrap, confidence, seed)
    if not isinstance(groups, Mapping):
        expected = "expected groups as a mapping, attribute name -> codes (N,)"
        raise ValueError(f"{expected}, got {type(groups).__name__}")
    named = labels.labels if isinstance(labels, CodeBook) else labels
    attributes = {name: _check_attribute(name, groups[name], named, len(y)) for name in groups}
    predicted = metrics.decide(s, threshold)
    blocks = [
        _all_metrics(weights, y, s, predicted, num_classes, attributes)
        for weights in _resamples(len(y), n_bootstrap, seed)
    ]
    values = np.hstack([blocks[0][:, :1], *(block[:, 1:] for block in blocks)])
    estimates = (_estimate(row[0], row[1:], (1 - confidence) / 2) for row in values)
    auc, accuracy = itertools.islice(estimates, 2)
    reports = {}
    for name, (codes, names) in attributes.items():
        counts = np.bincount(codes[codes >= 0], minlength=len(names)).tolist()
        sizes = len(_GAPS), len(names), len(names)
        gaps, *levels = (list(itertools.islice(estimates, size)) for size in sizes)
        if lone := group_remark(name, names, codes, tiny=0, many=math.inf):
            warnings.warn(lone, UserWarning, stacklevel=2)
            gaps = [Estimate(math.nan, math.nan, math.nan)] * len(_GAPS)
        members = tuple(map(GroupReport, names, counts, *levels))
        reports[name] = AttributeReport(members, int((codes < 0).sum()), *gaps)
    cut = threshold if num_classes == 2 else None
    how = (len(y), num_classes, cut, n_bootstrap, confidence, seed)
    report = FairnessReport(*how, auc, accuracy, reports)
    if math.isnan(auc.value):
        warnings.warn("one class only: the AUC is NaN", UserWarning, stacklevel=2)
    for name, of_one in reports.items():
        alone = [g.label for g in of_one.groups if g.count and math.isnan(g.auc.value)]
        if alone:
            what = f"group {alone[0]!r} holds one class only: its AUC is NaN"
            if len(alone) > 1:
                number = f"{len(alone)} of {len(of_one.groups)} groups"
                what = f"{number} hold one class only ({shortened(alone)}): their AUC is NaN"
            warnings.warn(f"attribute {name!r}: {what}", UserWarning, stacklevel=2)
    return report


def check_settings(
    threshold: float = 0.5, n_bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0
) -> None:
    """Refuse settings of `fairness_report` that are out of range."""
    check_integer("n_bootstrap", n_bootstrap, 0)
    check_integer("seed", seed, 0)
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1, got {confidence}")
    if not np.isfinite(threshold):
        raise ValueError(f"expected a finite threshold, got {threshold}")


def _check_attribute(
    name: str, values: npt.ArrayLike, named: Mapping[str, Sequence[str]] | None, size: int
) -> tuple[IntArray, Sequence[str]]:
    if named is not None and name not in named:
        raise ValueError(f"expected labels for attribute {name!r}, got {sorted(named)}")
    labels = None if named is None else named[name]
    try:
        codes, number = metrics.check_groups(values, size, None if labels is None else len(labels))
    except ValueError as error:
        raise ValueError(f"attribute {name!r}: {error}") from error
    return codes, list(map(str, range(number))) if labels is None else labels


def _all_metrics(
    weights: FloatArray,
    y: IntArray,
    scores: FloatArray,
    predicted: IntArray,
    num_classes: int,
    attributes: dict[str, tuple[IntArray, Sequence[str]]],
) -> FloatArray:
    """Compute each number for every row of the weights: (numbers, R), in the reports' order."""
    auc = metrics.macro_auc(weights, y, scores)
    right = weights @ (y == predicted) / weights.sum(axis=1)
    numbers = [auc, right]
    for codes, labels in attributes.values():
        aucs = metrics.group_macro_auc(weights, y, scores, codes, len(labels))
        rates = metrics.group_rates(weights, y, predicted, codes, len(labels), num_classes)
        es_auc, std, spread = metrics.group_spread(auc, aucs)
        es_accuracy, _, _ = metrics.group_spread(right, rates.accuracy)
        parity = metrics.mean_gap(metrics.gap(rates.selection))
        odds = metrics.mean_gap(metrics.odds_gap(rates.true_positive, rates.false_positive))
        numbers += [es_auc, es_accuracy, parity, odds, std, spread, *aucs.T, *rates.accuracy.T]
    return np.stack(numbers)


def _estimate(sample: float, resamples: FloatArray, tail: float) -> Estimate:
    """Return a number with the quantiles of its resamples that exist."""
    known = resamples[~np.isnan(resamples)]
    exists = len(known) and not np.isnan(sample)
    ends = np.quantile(known, [tail, 1 - tail]).tolist() if exists else (np.nan, np.nan)
    return Estimate(float(sample), *ends)


def _resamples(size: int, number: int, seed: int) -> Iterator[FloatArray]:
    """Yield weight blocks: the sample itself (ones) in row 0, bootstrap counts in the others."""
    generator = np.random.default_rng(seed)
    rows = max(1, BLOCK_SIZE // size)
    for start in range(0, max(number, 1), rows):
        block = min(rows, number - start)
        draws = generator.integers(size, size=(block, size)) + size * np.arange(block)[:, None]
        counts = np.bincount(draws.ravel(), minlength=block * size).reshape(block, size)
        yield np.concatenate([np.ones((1, size)), counts])
