"""Metrics against scikit-learn, fairlearn and plain loops."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re

import numpy as np
import pytest
import torch
from fairlearn import __version__ as fairlearn_version
from fairlearn import metrics as fairlearn_metrics
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, roc_auc_score

from fairclip_losses.data import CodeBook
from fairclip_losses.evaluation.report import AttributeReport
from fairclip_losses.metrics import (
    between_group_disparity,
    demographic_parity_difference,
    equalized_odds_difference,
    equity_scaled,
    fairness_report,
    group_roc_auc,
    roc_auc,
)

DPD, EOD = demographic_parity_difference, equalized_odds_difference
EXACT = {"rel": 0, "abs": 1e-12}
SEEDS = st.integers(0, 2**32 - 1)
drawn = settings(max_examples=30)
ONE_GROUP = pytest.mark.filterwarnings("ignore:one group alone:UserWarning")
ONE_CLASS = pytest.mark.filterwarnings("ignore:.*one class only:UserWarning")
FAIRLEARN = tuple(map(int, fairlearn_version.split(".")[:2]))


def sample(seed, classes=2, groups=3, size=None):
    """Random classes, scores, predictions, groups (with unknowns) and weights (with zeros)."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(8, 60)) if size is None else size
    y = rng.integers(0, classes, n)
    scores = np.round(rng.random(n if classes == 2 else (n, classes)), 1)  # with ties
    predicted = rng.integers(0, classes, n)
    group = rng.integers(-1, groups, n)
    group[0] = groups - 1
    weights = np.where(rng.random(n) < 0.2, 0.0, rng.random(n) * 10 ** rng.uniform(-3, 3, n))
    weights[0] = 1.0
    return y, scores, predicted, group, weights


def one_vs_rest_loop(y, scores, weights):
    """Macro AUC over the classes that have both sides, by scikit-learn."""
    columns = scores.T if scores.ndim == 2 else [1 - scores, scores]
    columns = [(y == k, s) for k, s in enumerate(columns)]
    values = [
        roc_auc_score(positive, score, sample_weight=weights)
        for positive, score in columns
        if weights[positive].sum() > 0 and weights[~positive].sum() > 0
    ]
    return np.mean(values) if values else np.nan


# AUC


@ONE_CLASS
@drawn
@given(SEEDS, st.sampled_from([2, 3, 6]), st.booleans())
def test_roc_auc_is_scikit_learns_also_within_groups(seed, classes, weighted):
    y, scores, _, group, weights = sample(seed, classes)
    given_weights, weights = (weights, weights) if weighted else (None, np.ones(len(y)))
    expected = one_vs_rest_loop(y, scores, weights)
    assert roc_auc(y, scores, given_weights) == pytest.approx(expected, nan_ok=True, **EXACT)
    expected = [
        one_vs_rest_loop(y[group == g], scores[group == g], weights[group == g]) for g in range(4)
    ]
    values = group_roc_auc(y, scores, group, num_groups=4, sample_weight=given_weights)
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-12)


@drawn
@given(SEEDS, st.sampled_from([3, 5]))
def test_multi_class_auc_is_scikit_learns_own_macro_average(seed, classes):
    y, scores, *_ = sample(seed, classes, size=50)
    y[:classes] = np.arange(classes)
    scores = (scores + 0.1) / (scores + 0.1).sum(axis=1, keepdims=True)
    expected = roc_auc_score(y, scores, multi_class="ovr", average="macro")
    assert roc_auc(y, scores) == pytest.approx(expected, **EXACT)


@drawn
@given(SEEDS)
def test_roc_auc_counts_pairs(seed):
    y, scores, *_ = sample(seed)
    positive, negative = scores[y == 1], scores[y == 0]
    if len(positive) and len(negative):
        wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
        assert roc_auc(y, scores) == pytest.approx(np.mean(wins), **EXACT)
        assert roc_auc(1 - y, scores) == pytest.approx(1 - np.mean(wins), **EXACT)
        assert roc_auc(y, np.exp(3 * scores)) == pytest.approx(np.mean(wins), **EXACT)


@ONE_GROUP
@drawn
@given(SEEDS)
def test_an_integer_weight_is_a_repetition(seed):
    y, scores, predicted, group, _ = sample(seed)
    y[:2], scores[:2] = [0, 1], [0.3, 0.7]
    count = np.random.default_rng(seed).integers(0, 4, len(y))
    count[:2] = 1
    many = np.repeat(np.arange(len(y)), count)
    assert roc_auc(y, scores, count) == pytest.approx(roc_auc(y[many], scores[many]), **EXACT)
    assert EOD(y, predicted, group, sample_weight=count) == pytest.approx(
        EOD(y[many], predicted[many], group[many]), nan_ok=True, **EXACT
    )


def test_two_score_columns_are_two_one_vs_rest_tasks_and_one_class_has_no_auc():
    assert roc_auc([0, 1, 1], [[0.9, 0.1], [0.2, 0.8], [0.95, 0.05]]) == 0.5
    for y, weights in (([0, 0, 0], None), ([1, 1, 1], None), ([0, 0, 1], [1, 1, 0])):
        with pytest.warns(UserWarning, match="one class only"):
            assert math.isnan(roc_auc(y, [0.1, 0.2, 0.3], weights))
    with pytest.warns(UserWarning, match="group 1 holds one class only"):
        values = group_roc_auc([0, 1, 1], [0.1, 0.9, 0.5], [0, 0, 1])
    np.testing.assert_array_equal(values, [1.0, np.nan])


# Gaps


@settings(max_examples=15)
@given(SEEDS, st.sampled_from([2, 4]), st.booleans())
def test_gaps_are_fairlearns(seed, classes, weighted):
    # With few samples in a group, classes are often missing from it.
    y, _, predicted, group, weights = sample(seed, classes)
    # fairlearn divides by a group's total weight and fails where that is 0.
    weights = weights + 0.01 if weighted else None
    known = group >= 0
    # Before 0.15, fairlearn loses the weight of a group of one.
    assume(not weighted or FAIRLEARN >= (0, 15) or 1 not in np.bincount(group[known]))
    assume(len(np.unique(group[known])) > 1)  # of one group fairlearn says 0
    options = {
        "sensitive_features": group[known],
        "sample_weight": None if weights is None else weights[known],
    }
    ours = {"num_classes": classes, "sample_weight": weights}
    for name, value in (
        ("demographic_parity_difference", DPD(predicted, group, **ours)),
        ("equalized_odds_difference", EOD(y, predicted, group, **ours)),
    ):
        function, (t, p) = getattr(fairlearn_metrics, name), (y[known], predicted[known])
        tasks = [1] if classes == 2 else range(classes)
        expected = np.mean([function(t == k, p == k, **options) for k in tasks])
        assert value == pytest.approx(expected, **EXACT), name


def test_a_rate_that_does_not_exist_counts_as_zero_or_not_at_all():
    # Group 1 has no positives; false positive rates 1/2 and 1/2, true positive rate of group 0: 1.
    y, predicted, group = [1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 1, 1]
    assert EOD(y, predicted, group) == 1.0
    assert EOD(y, predicted, group, undefined_rate="skip") == 0.0
    with pytest.raises(ValueError, match="undefined_rate must be one of zero, skip, got 'none'"):
        EOD(y, predicted, group, undefined_rate="none")

    # A class that never occurs has a false positive gap alone.
    y, predicted, group = [0, 1, 0, 1, 1], [0, 1, 2, 1, 1], [0, 0, 1, 1, 1]
    # Class 0: true positive rates 1 and 0; class 1: no gap; class 2: false positive rates 0, 1/3.
    value = EOD(y, predicted, group, num_classes=3, undefined_rate="skip")
    assert value == pytest.approx((1 + 0 + 1 / 3) / 3, **EXACT)
    # All positive: there is no false positive rate.
    assert EOD([1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1], undefined_rate="skip") == 0.5
    # Heavy weights do not swallow light ones.
    y, predicted, group = [1, 0, 0, 1, 0], [1, 1, 0, 1, 0], [0, 0, 0, 1, 1]
    assert EOD(y, predicted, group, sample_weight=[1e17, 1, 1, 1, 1]) == 0.5


def test_one_group_has_no_gap_and_is_said_to_be_alone():
    y, predicted = [0, 1, 1], [0, 1, 0]
    for groups, weights in (([2] * 3, None), ([2, -1, 2], None), ([2, 0, 0], [1, 0, 0])):
        for gap in (functools.partial(DPD, predicted), functools.partial(EOD, y, predicted)):
            with pytest.warns(UserWarning, match="^one group alone is known, 2: there is no gap"):
                assert math.isnan(gap(groups, sample_weight=weights))
            assert math.isnan(gap([-1, -1, -1]))
    # Group 0 alone has positives, group 1 alone negatives: neither rate can be compared.
    assert math.isnan(EOD([1, 1, 0], [1, 0, 1], [0, 0, 1], undefined_rate="skip"))
    assert EOD([1, 1, 0], [1, 0, 1], [0, 0, 1]) == 1.0


def test_a_report_shows_no_gap_of_one_group_as_perfect():
    y, scores = [0, 1, 0, 1], [0.1, 0.8, 0.6, 0.4]
    labels = {"Male": ("1",), "sex": ("f", "m")}
    groups = {"Male": [0, -1, 0, 0], "sex": [0, 0, 0, 0]}
    with pytest.warns(UserWarning) as caught:
        report = fairness_report(y, scores, groups, labels=labels, n_bootstrap=3)
    said = sorted(str(warning.message) for warning in caught)
    for text, (name, what) in zip(
        said, (("Male", "'1' (3 of 4 rows, 1"), ("sex", "'f' (4 of 4 rows, 0")), strict=True
    ):
        assert text.startswith(f"attribute {name!r}: one known group alone, {what} unknown)")
    for attribute in report.attributes.values():
        assert all(math.isnan(getattr(attribute, gap).value) for gap in GAPS)
        assert attribute.groups[0].auc.value == report.auc.value or attribute.unknown
    table = report.table().splitlines()
    assert sum(line.endswith("n/a") for line in table) == 2 * len(GAPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tensors_of_every_precision_are_read_with_and_without_a_gradient(dtype):
    y, group = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    scores = torch.tensor([0.1, 0.75, 0.5, 0.25], dtype=dtype, requires_grad=True)
    plain = scores.detach().double().numpy()
    assert roc_auc(y, scores) == roc_auc(y.numpy(), plain)
    assert roc_auc(y, [[1 - s, s] for s in scores]) == roc_auc(y.numpy(), plain)
    assert roc_auc(y, list(scores), scores) == roc_auc(y.numpy(), plain, plain)
    np.testing.assert_array_equal(
        group_roc_auc(y, scores, group), group_roc_auc(y.numpy(), plain, group.numpy())
    )
    assert DPD(y, group, sample_weight=scores) == DPD(y.numpy(), group.numpy(), sample_weight=plain)
    assert equity_scaled(scores[1], scores[:2]) == equity_scaled(plain[1], plain[:2])
    assert fairness_report(y, torch.stack([1 - scores, scores], 1), {"g": group}, n_bootstrap=0)
    with pytest.raises(ValueError, match="expected groups as integer codes, got dtype float64"):
        DPD(y, scores)


@drawn
@given(st.floats(0.01, 1), st.lists(st.floats(0, 1) | st.just(math.nan), min_size=1, max_size=6))
def test_equity_scaled_and_disparity_are_their_formulas(overall, values):
    known = [value for value in values if not math.isnan(value)]
    expected = overall / (1 + sum(abs(overall - value) for value in known)) if known else math.nan
    std = np.std(known) / overall if len(known) > 1 else math.nan  # a spread is between groups
    spread = (max(known) - min(known)) / overall if len(known) > 1 else math.nan
    found = (equity_scaled(overall, values), *between_group_disparity(overall, values))
    assert found == pytest.approx((expected, std, spread), nan_ok=True, **EXACT)
    assert not found[0] > overall


def test_nothing_to_scale():
    for overall, values in ((math.nan, [0.5, 0.6]), (0.5, [])):
        assert math.isnan(equity_scaled(overall, values))
    assert between_group_disparity(0.5, [0.5, 0.5]) == (0, 0)
    assert all(map(math.isnan, between_group_disparity(0.0, [0.0, 0.0])))


# Bad input


@pytest.mark.parametrize(
    ("y", "scores", "message"),
    [
        ([], [], r"got shape \(0,\)"),
        ([0, 1], [[[0.1]], [[0.2]]], r"got shape \(2, 1, 1\)"),
        ([0, 1], [[0.1], [0.2]], r"got shape \(2, 1\)"),
        ([0, 1, 1], [0.1, 0.2], r"expected y_true of shape \(2,\), got \(3,\)"),
        ([0, 2], [0.1, 0.2], r"expected y_true in 0\.\.1, got 2"),
        ([-1, 1], [0.1, 0.2], r"expected y_true in 0\.\.1, got -1"),
        ([0, 3], [[0.1, 0.2, 0.7]] * 2, r"expected y_true in 0\.\.2, got 3"),
        ([0.0, 1.0], [0.1, 0.2], "expected y_true as integer codes, got dtype float64"),
        ([0, 1], [0.1, math.nan], "expected finite scores, got nan"),
        ([0, 1], [0.1, -math.inf], "expected finite scores, got -inf"),
    ],
)
def test_bad_samples(y, scores, message):
    with pytest.raises(ValueError, match=message):
        roc_auc(y, scores)
    with pytest.raises(ValueError, match=message):
        fairness_report(y, scores, {})


BINARY = ([0, 1], [0.1, 0.9])
REPORT = functools.partial(fairness_report, *BINARY)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: equity_scaled(1, [[1]]), r"expected group values \(G,\), got shape \(1, 1\)"),
        (lambda: roc_auc(*BINARY, [1.0]), r"sample_weight of shape \(2,\), got \(1,\)"),
        (lambda: roc_auc(*BINARY, [1.0, -1.0]), "not negative"),
        (lambda: roc_auc(*BINARY, [1.0, math.nan]), "finite"),
        (lambda: DPD([0, 1], [0, 0], sample_weight=[0.0, 0.0]), "not all 0"),
        (lambda: DPD([0, 2], [0, 1]), r"y_pred in 0\.\.1, got 2"),
        (lambda: DPD([], []), r"y_pred of shape \(N,\), N >= 1, got \(0,\)"),
        (lambda: DPD([0, 1], ["f", "m"]), "groups as integer codes, got dtype <U1"),
        (lambda: DPD([0, 0], [0, 1], num_classes=1), "num_classes must be .* 2 or more, got 1"),
        (lambda: DPD([0, 1], [0, -2]), r"groups of -1 \(unknown\) or more, got -2"),
        (lambda: EOD([0, 2], [0, 1], [0, 1]), r"y_true in 0\.\.1, got 2"),
        (lambda: EOD([0], [0, 1], [0, 1]), r"y_true of shape \(2,\), got \(1,\)"),
        (lambda: EOD([0, 1], [0, 1], [0, 1, 1]), r"groups of shape \(2,\), got \(3,\)"),
        (lambda: EOD([0, 1], [0, -1], [0, 1]), r"y_pred in 0\.\.1, got -1"),
        (lambda: group_roc_auc(*BINARY, [0, 2], num_groups=2), r"groups in -1\.\.1, got 2"),
        (lambda: group_roc_auc(*BINARY, [0, -2], num_groups=2), r"groups in -1\.\.1, got -2"),
        (lambda: REPORT({"sex": [0, 2]}, labels={"sex": "fm"}), r"'sex': .* -1\.\.1, got 2"),
        (lambda: REPORT({"a": [0, -2]}), r"'a': expected groups of -1 \(unknown\) or more, got -2"),
        (lambda: REPORT(np.array([0, 1])), "groups as a mapping, attribute name -> .*, got ndarr"),
        (lambda: REPORT({}, confidence=1.0), "confidence between 0 and 1, got 1.0"),
        (lambda: REPORT({}, confidence=math.nan), "confidence between 0 and 1, got nan"),
        (lambda: REPORT({}, n_bootstrap=-1), "n_bootstrap must be an integer of 0 or more, got -1"),
        (lambda: REPORT({}, threshold=math.nan), "finite threshold, got nan"),
        (lambda: REPORT({"a": [0, 0]}, labels={"b": "x"}), r"labels for attribute 'a', got \['b'"),
    ],
)
def test_bad_weights_codes_and_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The report


GAPS = [field.name for field in dataclasses.fields(AttributeReport)][2:]


@pytest.mark.parametrize("classes", [2, 4])
def test_report_values_are_those_of_the_functions(classes):
    y, scores, _, group, _ = sample(7, classes, size=300)
    other = (np.arange(300) % 2).astype(np.int64)
    report = fairness_report(y, scores, {"race": group, "sex": other}, n_bootstrap=0)
    predicted = (scores >= 0.5).astype(int) if classes == 2 else scores.argmax(axis=1)
    assert report.auc.value == pytest.approx(roc_auc(y, scores), **EXACT)
    assert report.accuracy.value == pytest.approx(accuracy_score(y, predicted), **EXACT)
    assert report.num_samples == 300 and report.num_classes == classes
    assert report.threshold == (0.5 if classes == 2 else None)
    for name, codes in {"race": group, "sex": other}.items():
        attribute = report.attributes[name]
        size = codes.max() + 1
        aucs = group_roc_auc(y, scores, codes)
        rights = [accuracy_score(y[codes == g], predicted[codes == g]) for g in range(size)]
        assert attribute.unknown == (codes == -1).sum()
        assert [g.label for g in attribute.groups] == [str(g) for g in range(size)]
        assert [g.count for g in attribute.groups] == np.bincount(codes[codes >= 0]).tolist()
        np.testing.assert_allclose([g.auc.value for g in attribute.groups], aucs, atol=1e-12)
        np.testing.assert_allclose([g.accuracy.value for g in attribute.groups], rights, atol=1e-12)
        expected = (
            equity_scaled(report.auc.value, aucs),
            equity_scaled(report.accuracy.value, rights),
            DPD(predicted, codes, num_classes=classes),
            EOD(y, predicted, codes, num_classes=classes),
            *between_group_disparity(report.auc.value, aucs),
        )
        for metric, value in zip(GAPS, expected, strict=True):
            assert getattr(attribute, metric).value == pytest.approx(value, **EXACT), metric


@pytest.mark.parametrize("classes", [2, 3])
def test_intervals_are_those_of_a_loop_over_resamples(classes):
    y, scores, _, group, _ = sample(3, classes, size=80)
    options = {"n_bootstrap": 40, "confidence": 0.9, "seed": 11}
    rows = fairness_report(y, scores, {"race": group}, **options).to_rows()
    draws = np.random.default_rng(11).integers(80, size=(40, 80))
    loop = [fairness_report(y[i], scores[i], {"race": group[i]}, n_bootstrap=0) for i in draws]
    values = np.array([[row["value"] for row in report.to_rows()] for report in loop], float)
    assert len(rows) == values.shape[1] == 2 + 6 + 2 * 3
    expected = np.nanquantile(values, [0.05, 0.95], axis=0).T
    found = [[row["low"], row["high"]] for row in rows]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_intervals_do_not_depend_on_how_the_resamples_are_cut_into_blocks(monkeypatch):
    y, scores, _, group, _ = sample(5, size=63)
    report = functools.partial(fairness_report, y, scores, {"race": group}, n_bootstrap=50)
    whole = report()
    assert whole != report(seed=1)
    monkeypatch.setattr("fairclip_losses.evaluation.report.BLOCK_SIZE", 63 * 7)
    assert report() == whole


def test_intervals_cover_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth, hits = 0.7602499389065233, 0  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    for seed in range(40):
        y = np.repeat([0, 1], 60)
        auc = fairness_report(y, y + rng.normal(size=120), {}, n_bootstrap=200, seed=seed).auc
        hits += auc.low <= truth <= auc.high
    assert 34 <= hits <= 40


def test_a_resample_without_a_value_is_left_out():
    # Group 1 has a single positive: about a third of the resamples lose it.
    y = np.array([0, 1] * 20 + [0, 0, 0, 1])
    scores = np.linspace(0, 1, 44)
    group = np.repeat([0, 1], [40, 4])
    report = fairness_report(y, scores, {"race": group}, n_bootstrap=200)
    rare = report.attributes["race"].groups[1]
    assert rare.auc.value == rare.auc.low == 1.0
    assert math.isfinite(report.attributes["race"].es_auc.low)


def test_a_group_of_one_class_is_nan_left_out_and_warned_of():
    y = [0, 1, 0, 1, 1, 1]
    scores = [0.1, 0.8, 0.6, 0.4, 0.9, 0.2]
    labels = CodeBook({"sex": ("f", "m", "x"), "more": ("a",)})
    groups = {"sex": [0, 0, 0, 0, 1, 1]}
    with pytest.warns(UserWarning, match="attribute 'sex': group 'm' holds one class only"):
        report = fairness_report(y, scores, groups, labels=labels, n_bootstrap=10)
    sex = report.attributes["sex"]
    assert math.isnan(sex.groups[1].auc.value) and math.isnan(sex.groups[1].auc.low)
    assert sex.es_auc.value == equity_scaled(report.auc.value, [sex.groups[0].auc.value])
    # Group m has no negatives: the gap of the false positive rates is that of group f alone.
    assert sex.equalized_odds_difference.value == EOD(
        y, np.array(scores) >= 0.5, groups["sex"], undefined_rate="skip"
    )
    rows = {(row["group"], row["metric"]): row for row in report.to_rows()}
    assert rows["m", "auc"]["value"] is None and rows["m", "auc"]["count"] == 2
    assert rows["x", "auc"]["value"] is None and rows["x", "auc"]["count"] == 0
    assert "n/a" in report.table()

    # All of one class, and nothing known of an attribute.
    with pytest.warns(UserWarning, match="^one class only: the AUC is NaN"):
        report = fairness_report([1, 1], [0.1, 0.9], {"sex": [-1, -1]}, n_bootstrap=5)
    sex = report.attributes["sex"]
    assert math.isnan(report.auc.value) and report.accuracy.value == 0.5
    assert sex.groups == () and sex.unknown == 2
    assert math.isnan(sex.es_auc.value) and math.isnan(sex.demographic_parity_difference.value)


def test_report_as_dict_rows_and_table_of_one_column_or_two():
    y, scores, _, group, _ = sample(1, size=60)
    options = {"labels": {"race": "abcd"}, "n_bootstrap": 10, "threshold": 0.3}
    report = fairness_report(y, scores, {"race": group}, **options)
    columns = np.stack([1 - scores, scores], axis=1)
    two = fairness_report(y, columns, {"race": group}, **options)
    assert two.to_dict() == report.to_dict()  # in which NaN is None
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["auc"]["value"] == report.auc.value
    nothing = {"value": None, "low": None, "high": None}
    absent = {"label": "d", "count": 0, "auc": nothing, "accuracy": nothing}
    assert content["attributes"]["race"]["groups"][3] == absent
    rows = report.to_rows()
    assert len(rows) == 2 + 6 + 2 * 4
    auc = {"value": report.auc.value, "low": report.auc.low, "high": report.auc.high}
    assert rows[0] == {"attribute": "", "group": "", "metric": "auc", **auc, "count": 60}
    counts = [row["count"] for row in rows if row["metric"] == "auc" and row["group"]]
    assert sum(counts) == 60 - report.attributes["race"].unknown
    table = report.table()
    assert table.startswith("60 samples, binary; [95 % interval, 10 resamples]")
    for text in ("ES-AUC", "AUC, a", "accuracy, d", "n=0", f"{report.auc.value:.3f}", "unknown"):
        assert text in table
    assert all(line == line.rstrip() for line in table.splitlines())
    bare = fairness_report(y, scores, {"race": group}, n_bootstrap=0)
    assert math.isnan(bare.auc.low) and math.isnan(bare.auc.high) and "[" not in bare.table()


def test_many_groups_of_one_class_are_one_warning():
    y, groups = np.arange(50) % 2, {"age": np.arange(50)}
    with pytest.warns(UserWarning) as caught:
        fairness_report(y, y, groups, threshold=torch.tensor(0.5, requires_grad=True))
    expected = r"attribute 'age': 50 of 50 groups hold one class only \('0', '1', .*, \.\.\.\)"
    assert re.match(expected, str(caught.pop().message)) and not caught.list
