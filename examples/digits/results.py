"""Read what the demo's runs wrote, and compute what the report shows.

Nothing here draws or formats: every function goes from arrays to arrays or small dataclasses, and
is tested against scikit-learn.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fairclip_losses import metrics

Array = npt.NDArray[Any]
RUNS = ("plain", "fair")


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        return self.low <= other.high and other.low <= self.high

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Metric:
    """A number of the fairness report: where `fairness.csv` has it, and which way is better."""

    title: str
    attribute: str
    group: str
    name: str
    higher_is_better: bool = True

    @property
    def key(self) -> tuple[str, str, str]:
        return self.attribute, self.group, self.name


METRICS = (
    Metric("AUC", "", "", "auc"),
    Metric("ES-AUC", "group", "", "es_auc"),
    Metric("AUC, majority", "group", "majority", "auc"),
    Metric("AUC, minority", "group", "minority", "auc"),
    Metric("DPD", "group", "", "demographic_parity_difference", False),
    Metric("DEOdds", "group", "", "equalized_odds_difference", False),
    Metric("ES-AUC, site (control)", "site", "", "es_auc"),
)


@dataclass(frozen=True)
class Predictions:
    """One model's output on the evaluated images: truth (N,), probabilities (N, K), groups."""

    digit: Array
    probabilities: Array
    groups: dict[str, Array]
    ids: Array

    @property
    def predicted(self) -> Array:
        return np.asarray(np.argmax(self.probabilities, axis=1))


@dataclass(frozen=True)
class Run:
    """One evaluated model: its fairness report by (attribute, group, metric), its predictions."""

    fairness: dict[tuple[str, str, str], Interval]
    predictions: Predictions


@dataclass(frozen=True)
class Mining:
    """How the miner's findings compare with the planted wrong captions, after one epoch.

    Flagged means found faulty. `false_flag_rate` is the share of a group's right pairs that are
    flagged all the same: what mining costs the group.
    """

    precision: float
    recall: float
    auroc: float
    wrong_share: float
    noisy: int
    flag_rate: dict[str, float]
    false_flag_rate: dict[str, float]
    group_recall: dict[str, float]


@dataclass(frozen=True)
class Pairs:
    """What the miner knew of each training pair after one epoch, joined with the truth."""

    ids: Array
    files: list[str]
    captions: list[str]
    group: Array
    mean_loss: Array
    z_score: Array
    kind: Array
    wrong: Array
    digit: Array


@dataclass(frozen=True)
class SeedResult:
    """The two runs of one seed, the miner's findings after each epoch, and the planted truth."""

    seed: int
    runs: dict[str, Run]
    epochs: dict[int, Pairs]
    source: Array  # of each evaluated image, its row in scikit-learn's data

    @property
    def last(self) -> Pairs:
        return self.epochs[max(self.epochs)]


def read_rows(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def load_seed(folder: Path) -> SeedResult:
    """Read one seed's folder as `run.py` leaves it."""
    truth = {int(row["id"]): row for row in read_rows(folder / "data" / "truth.csv", "\t")}
    runs = {name: load_run(folder / name / "evaluation") for name in RUNS}
    ids = runs["plain"].predictions.ids
    if not np.array_equal(ids, runs["fair"].predictions.ids):
        raise ValueError(f"{folder}: the two runs were evaluated on different images")
    epochs = {}
    for path in (folder / "fair" / "checkpoints").glob("pairs_epoch_*.csv"):
        number = re.fullmatch(r"pairs_epoch_(\d+)\.csv", path.name)
        if number:
            epochs[int(number[1])] = load_pairs(path, truth)
    if not epochs:
        raise ValueError(f"{folder}: the fair run left no pairs_epoch_*.csv")
    return SeedResult(
        seed=int(folder.name.removeprefix("seed-")),
        runs=runs,
        epochs=dict(sorted(epochs.items())),
        source=np.array([int(truth[identity]["source"]) for identity in ids]),
    )


def load_run(folder: Path) -> Run:
    fairness = {
        (row["attribute"], row["group"], row["metric"]): Interval(
            *(float(row[name]) if row[name] else np.nan for name in ("value", "low", "high"))
        )
        for row in read_rows(folder / "fairness.csv")
    }
    rows = read_rows(folder / "predictions.csv")
    classes = [name for name in rows[0] if name.startswith("prob_")]
    digit = np.array([int(row["label"]) for row in rows])
    return Run(
        fairness,
        Predictions(
            digit=digit,
            probabilities=np.array([[float(row[name]) for name in classes] for row in rows]),
            groups={name: np.array([row[name] for row in rows]) for name in ("group", "site")},
            # The images are named by the pair's id.
            ids=np.array([int(Path(row["file"]).stem) for row in rows]),
        ),
    )


def load_pairs(path: Path, truth: dict[int, dict[str, str]]) -> Pairs:
    rows = read_rows(path)
    ids = np.array([int(row["id"]) for row in rows])
    return Pairs(
        ids=ids,
        files=[row["file"] for row in rows],
        captions=[row["caption"] for row in rows],
        group=np.array([row["group"] for row in rows]),
        mean_loss=np.array([float(row["mean_loss"]) for row in rows]),
        z_score=np.array([float(row["z_score"]) for row in rows]),
        kind=np.array([row["kind"] for row in rows]),
        wrong=np.array([truth[identity]["wrong"] == "1" for identity in ids]),
        digit=np.array([int(truth[identity]["digit"]) for identity in ids]),
    )


def mining(pairs: Pairs) -> Mining:
    """Compare the flags and the mean losses of one epoch with the planted truth."""
    flagged = pairs.kind == "faulty"
    labels = [str(label) for label in np.unique(pairs.group)]
    one_kind = pairs.wrong.all() or not pairs.wrong.any()
    return Mining(
        precision=_share(pairs.wrong, flagged),
        recall=_share(flagged, pairs.wrong),
        auroc=np.nan if one_kind else metrics.roc_auc(pairs.wrong.astype(int), pairs.mean_loss),
        wrong_share=float(pairs.wrong.mean()),
        noisy=int((pairs.kind == "noisy").sum()),
        flag_rate={k: _share(flagged, pairs.group == k) for k in labels},
        false_flag_rate={k: _share(flagged, (pairs.group == k) & ~pairs.wrong) for k in labels},
        group_recall={k: _share(flagged, (pairs.group == k) & pairs.wrong) for k in labels},
    )


def _share(what: Array, among: Array) -> float:
    return float(what[among].mean()) if among.any() else np.nan


def macro_roc(digit: Array, probabilities: Array, grid: Array) -> Array:
    """One-vs-rest ROC curve averaged over the classes: true positive rate at each rate of `grid`.

    A class that no sample, or every sample, belongs to is left out.
    """
    curves = []
    for k in range(probabilities.shape[1]):
        positive = digit == k
        if positive.all() or not positive.any():
            continue
        order = np.argsort(-probabilities[:, k], kind="stable")
        score = probabilities[order, k]
        # Samples of equal score enter together: one point after each run of ties.
        ends = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)
        tpr = np.append(0.0, np.cumsum(positive[order])[ends] / positive.sum())
        fpr = np.append(0.0, np.cumsum(~positive[order])[ends] / (~positive).sum())
        curves.append(np.interp(grid, fpr, tpr))
    return np.asarray(np.mean(curves, axis=0))


@dataclass(frozen=True)
class Comparison:
    """One metric over the seeds: each run's values, and the paired difference fair - plain.

    `difference` is the mean over the seeds with the interval of a paired bootstrap over the images,
    `better` the number of seeds in which the fair run is better.
    """

    metric: Metric
    values: dict[str, Array]
    difference: Interval
    better: int

    @property
    def gain(self) -> Interval:
        """The difference with its sign turned so that positive is better."""
        d = self.difference
        if self.metric.higher_is_better:
            return d
        return Interval(-d.value, -d.high, -d.low)


def compare(results: Sequence[SeedResult], resamples: int = 300) -> list[Comparison]:
    """Put the runs of all seeds side by side, metric by metric."""
    draws = _paired_differences(results, resamples)
    comparisons = []
    for column, metric in enumerate(METRICS):
        values = {
            name: np.array([r.runs[name].fairness[metric.key].value for r in results])
            for name in RUNS
        }
        difference = values["fair"] - values["plain"]
        sign = 1 if metric.higher_is_better else -1
        low, high = np.nanquantile(draws[:, column], [0.025, 0.975])
        comparisons.append(
            Comparison(
                metric,
                values,
                Interval(float(difference.mean()), float(low), float(high)),
                int((sign * difference > 0).sum()),
            )
        )
    return comparisons


def _paired_differences(results: Sequence[SeedResult], resamples: int) -> Array:
    """Bootstrap the mean over the seeds of fair - plain: (resamples, number of METRICS).

    A resample weighs scikit-learn's images, and both runs of every seed get the same weights: what
    they share (the images, and that one image is in several seeds' tables) cancels or counts once.
    """
    rng = np.random.default_rng(0)
    count = 1 + max(int(result.source.max()) for result in results)
    out = np.empty((resamples, len(METRICS)))
    for row in range(resamples):
        weights = np.bincount(rng.integers(count, size=count), minlength=count).astype(float)
        difference = np.zeros(len(METRICS))
        for result in results:
            own = weights[result.source]
            fair, plain = (
                _weighted_metrics(result.runs[name].predictions, own) for name in ("fair", "plain")
            )
            difference += (fair - plain) / len(results)
        out[row] = difference
    return out


def _weighted_metrics(predictions: Predictions, weights: Array) -> Array:
    """Return METRICS of one run with its images weighted."""
    kept = weights > 0
    y, scores = predictions.digit[kept], predictions.probabilities[kept]
    predicted, weights = predictions.predicted[kept], weights[kept]
    overall = metrics.roc_auc(y, scores, weights)
    values: dict[tuple[str, str, str], float] = {("", "", "auc"): overall}
    weighted = {"num_classes": scores.shape[1], "sample_weight": weights}
    for name, column in predictions.groups.items():
        labels, codes = np.unique(column[kept], return_inverse=True)
        groups = metrics.group_roc_auc(y, scores, codes, sample_weight=weights)
        values |= {(name, str(k), "auc"): float(v) for k, v in zip(labels, groups, strict=True)}
        values[name, "", "es_auc"] = metrics.equity_scaled(overall, groups)
        values[name, "", "demographic_parity_difference"] = metrics.demographic_parity_difference(
            predicted, codes, **weighted
        )
        values[name, "", "equalized_odds_difference"] = metrics.equalized_odds_difference(
            y, predicted, codes, undefined_rate="skip", **weighted
        )
    return np.array([values[metric.key] for metric in METRICS])
