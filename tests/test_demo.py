"""The digits demo: its planted data, the report's numbers, and how it runs its children."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference
from PIL import Image
from sklearn.metrics import precision_score, recall_score, roc_auc_score, roc_curve

from fairclip_losses.metrics import fairness_report

DEMO = Path(__file__).resolve().parent.parent / "examples" / "digits"
sys.path.insert(0, str(DEMO))

import children  # noqa: E402
import make_data  # noqa: E402
import reading  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import run  # noqa: E402


@pytest.fixture(scope="module")
def pairs():
    return make_data.plant(0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_data.write_data(tmp_path_factory.mktemp("digits"), 0)


def table(path):
    return results.read_rows(path, "\t")


# Data


def test_a_seed_plants_what_the_recipe_says(pairs):
    recipe = make_data.Recipe()
    assert pairs.images.shape == (1797, 32, 32) and pairs.images.dtype == np.uint8
    assert len(np.unique(pairs.ids)) == 1797
    assert np.allclose(np.bincount(pairs.split) / 1797, recipe.split_shares, atol=0.01)
    for split, digit in itertools.product(range(3), range(10)):  # stratified
        cell = (pairs.split == split) & (pairs.digit == digit)
        assert abs(pairs.group[cell].mean() - recipe.minority_share) < 0.05
    spread = pairs.images.reshape(1797, -1).std(axis=1)
    assert spread[pairs.group == 1].mean() < 0.8 * spread[pairs.group == 0].mean()
    assert abs(spread[pairs.site == 0].mean() - spread[pairs.site == 1].mean()) < 2
    assert not pairs.wrong[pairs.split != 0].any()
    for group, rate in enumerate(recipe.wrong_captions):
        assert abs(pairs.site[pairs.group == group].mean() - 0.5) < 0.02
        members = (pairs.split == 0) & (pairs.group == group)
        assert pairs.wrong[members].sum() == round(rate * members.sum())
    for caption, said in zip(pairs.captions, pairs.caption_digit, strict=True):
        words = [word for word in make_data.WORDS if word in caption.split()]
        # "one" is also a word of a template.
        assert make_data.WORDS[said] in words and set(words) <= {make_data.WORDS[said], "one"}
    again, other = make_data.plant(0), make_data.plant(4)
    for name in ("ids", "images", "caption_digit", "group", "site", "split"):
        assert np.array_equal(getattr(pairs, name), getattr(again, name))
        assert not np.array_equal(getattr(pairs, name), getattr(other, name))


def test_the_tables_hold_what_was_planted_and_the_training_table_no_truth(files, pairs):
    truth = {int(row["id"]): row for row in table(files.truth)}
    train = table(files.train)
    assert list(train[0]) == ["id", "filepath", "title", "group", "site"]
    assert list(table(files.val)[0]) == [*train[0], "digit"]
    # Neither the order of the rows nor the id tells what is wrong.
    wrong = np.array([int(truth[int(row["id"])]["wrong"]) for row in train])
    assert abs(np.corrcoef(np.arange(len(wrong)), wrong)[0, 1]) < 0.1
    splits = {name: table(getattr(files, name)) for name in make_data.SPLITS}
    assert sorted(truth) == sorted(int(row["id"]) for part in splits.values() for row in part)
    for name, part in splits.items():
        for row in part:
            known = truth[int(row["id"])]
            i = int(known["source"])
            assert known["split"] == name and pairs.ids[i] == int(row["id"])
            assert row["title"] == pairs.captions[i]
            assert row["group"] == make_data.GROUPS[pairs.group[i]] == known["group"]
            assert row.get("digit", known["digit"]) == str(pairs.digit[i])
            assert int(known["wrong"]) == pairs.wrong[i]
            assert Path(row["filepath"]).name == f"{row['id']}.png"
    with Image.open(row["filepath"]) as image:
        assert np.array_equal(np.asarray(image), pairs.images[i])


# Numbers of the report


def random_predictions(rng, count=200):
    digit = rng.integers(4, size=count)
    logits = rng.normal(size=(count, 4)) + 1.2 * np.eye(4)[digit]
    # Rounded: ties between probabilities occur.
    probabilities = np.round(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), 2)
    groups = {
        "group": np.array(make_data.GROUPS)[(rng.random(count) < 0.3).astype(int)],
        "site": np.array(make_data.SITES)[rng.integers(2, size=count)],
    }
    return results.Predictions(digit, probabilities, groups, np.arange(count))


def ovr_auc(seen, members, weights):
    columns = seen.probabilities[members].T
    options = {"sample_weight": weights[members]}
    truth = seen.digit[members]
    return np.mean([roc_auc_score(truth == k, s, **options) for k, s in enumerate(columns)])


@pytest.mark.parametrize("seed", range(2))
def test_weighted_metrics_equal_scikit_learn_and_fairlearn(seed):
    rng = np.random.default_rng(seed)
    seen = random_predictions(rng)
    weights = rng.integers(0, 3, size=200).astype(float)
    titles = [metric.title for metric in results.METRICS]
    values = dict(zip(titles, results._weighted_metrics(seen, weights), strict=True))
    everyone = np.ones(200, dtype=bool)
    overall = ovr_auc(seen, everyone, weights)
    assert values["AUC"] == pytest.approx(overall)
    for attribute, title in (("group", "ES-AUC"), ("site", "ES-AUC, site (control)")):
        column = seen.groups[attribute]
        aucs = [ovr_auc(seen, column == label, weights) for label in np.unique(column)]
        expected = overall / (1 + sum(abs(overall - auc) for auc in aucs))
        assert values[title] == pytest.approx(expected)
        if attribute == "group":
            assert values["AUC, majority"] == pytest.approx(aucs[0])
            assert values["AUC, minority"] == pytest.approx(aucs[1])
    dpd, odds = [], []
    for k in range(4):
        binary = (seen.digit == k, seen.predicted == k)
        options = {"sensitive_features": seen.groups["group"], "sample_weight": weights}
        dpd.append(demographic_parity_difference(*binary, **options))
        odds.append(equalized_odds_difference(*binary, **options))
    assert values["DPD"] == pytest.approx(np.mean(dpd))
    assert values["DEOdds"] == pytest.approx(np.mean(odds))


def test_macro_roc_equals_scikit_learn():
    seen = random_predictions(np.random.default_rng(1))
    grid = np.linspace(0, 1, 400)
    curves = []
    for k in range(4):
        fpr, tpr, _ = roc_curve(seen.digit == k, seen.probabilities[:, k], drop_intermediate=False)
        curves.append(np.interp(grid, fpr, tpr))
    assert np.allclose(results.macro_roc(seen.digit, seen.probabilities, grid), np.mean(curves, 0))

    digit = np.array([0, 0, 1, 1])  # class 2 is absent and left out
    probabilities = np.array([[0.8, 0.2, 0], [0.6, 0.4, 0], [0.3, 0.7, 0], [0.1, 0.9, 0]])
    assert results.macro_roc(digit, probabilities, np.array([0.0, 0.5])) == pytest.approx([1, 1])


def some_pairs(rng, count=120):
    wrong = rng.random(count) < 0.2
    loss = rng.normal(size=count) + 2 * wrong
    return results.Pairs(
        ids=np.arange(count),
        files=[""] * count,
        captions=["the digit one"] * count,
        group=np.array(make_data.GROUPS)[rng.integers(2, size=count)],
        mean_loss=loss,
        z_score=(loss - loss.mean()) / loss.std(),
        kind=np.where(loss > 1.5, "faulty", np.where(loss < -1.5, "noisy", "clean")),
        wrong=wrong,
        digit=rng.integers(10, size=count),
    )


@pytest.mark.parametrize("seed", range(2))
def test_mining_equals_scikit_learn(seed):
    pairs = some_pairs(np.random.default_rng(seed))
    found, flagged = results.mining(pairs), pairs.kind == "faulty"
    assert found.precision == pytest.approx(precision_score(pairs.wrong, flagged))
    assert found.recall == pytest.approx(recall_score(pairs.wrong, flagged))
    assert found.auroc == pytest.approx(roc_auc_score(pairs.wrong, pairs.mean_loss))
    assert found.wrong_share == pytest.approx(pairs.wrong.mean())
    for group in make_data.GROUPS:
        members = pairs.group == group
        assert found.flag_rate[group] == pytest.approx(flagged[members].mean())
        right = members & ~pairs.wrong
        assert found.false_flag_rate[group] == pytest.approx(flagged[right].mean())
        assert found.group_recall[group] == pytest.approx(flagged[members & pairs.wrong].mean())

    found = results.mining(replace(pairs, kind=np.full(len(pairs.ids), "clean")))
    assert np.isnan(found.precision) and found.recall == 0


def comparison(difference, low, high, title="AUC"):
    metric = next(metric for metric in results.METRICS if metric.title == title)
    plain = np.full(len(difference), 0.8)
    sign = 1 if metric.higher_is_better else -1
    better = sum(sign * d > 0 for d in difference)
    interval = results.Interval(float(np.mean(difference)), low, high)
    return results.Comparison(
        metric, {"plain": plain, "fair": plain + difference}, interval, better
    )


@pytest.mark.parametrize(
    ("compared", "expected"),
    [
        (comparison([0.02, 0.03, 0.01], 0.01, 0.04), "fair is better"),
        (comparison([-0.02, -0.03, -0.01], -0.04, -0.01), "plain is better"),
        (comparison([-0.02, -0.03, -0.01], -0.04, -0.01, "DPD"), "fair is better"),
        (comparison([0.02, 0.03, 0.01], 0.01, 0.04, "DEOdds"), "plain is better"),
        (comparison([0.05, 0.03, -0.01], 0.01, 0.04), "fair leads on average"),
        (comparison([-0.05, -0.03, 0.01], -0.04, -0.01), "plain leads on average"),
        (comparison([0.02, 0.03, 0.01], -0.01, 0.04), "no difference shown (fair ahead"),
        (comparison([-0.02, -0.03, 0.01], -0.05, 0.02), "no difference shown (plain ahead"),
        (comparison([0.0, 0.0], 0.0, 0.0), "no difference"),
    ],
)
def test_the_reading_follows_the_numbers(compared, expected):
    assert reading.verdict(compared).startswith(expected)


# A whole report from finished runs


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def fake_run(folder, test, skill, seed):
    """Write what the evaluation of a model with some skill would leave."""
    rng = np.random.default_rng(seed)
    digit = np.array([int(row["digit"]) for row in test])
    logits = rng.normal(size=(len(test), 10)) + skill * np.eye(10)[digit]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    names = {"group": make_data.GROUPS, "site": make_data.SITES}
    codes = {k: np.array([v.index(row[k]) for row in test]) for k, v in names.items()}
    fairness = fairness_report(digit, probabilities, codes, labels=names, n_bootstrap=20)
    write_rows(folder / "fairness.csv", [dict(row) for row in fairness.to_rows()])
    write_rows(
        folder / "predictions.csv",
        [
            {"file": row["filepath"], "label": row["digit"]}
            | {f"prob_{k}": p for k, p in enumerate(line)}
            | {name: row[name] for name in names}
            for row, line in zip(test, probabilities, strict=True)
        ],
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    for seed in (0, 1):
        folder = output / f"seed-{seed}"
        data = make_data.write_data(folder / "data", seed)
        for name, skill in (("plain", 1.0), ("fair", 1.6)):
            fake_run(folder / name / "evaluation", table(data.test), skill, seed)
        truth = {row["id"]: row for row in table(data.truth)}
        for epoch in (1, 2):
            rng = np.random.default_rng(seed)
            rows = []
            for row in table(data.train):
                loss = rng.normal() + epoch * int(truth[row["id"]]["wrong"])
                rows.append(
                    {"id": row["id"], "file": row["filepath"], "caption": row["title"]}
                    | {"group": row["group"], "site": row["site"], "visits": epoch}
                    | {"mean_loss": loss, "z_score": loss}
                    | {"kind": "faulty" if loss > 1.5 else "clean"}
                )
            write_rows(folder / "fair" / "checkpoints" / f"pairs_epoch_{epoch}.csv", rows)
    conditions = {"seeds": [0, 1], "epochs": 2, "split": "test", "seconds": 1.0, "cores": 2}
    conditions |= {"python": "3", "versions": {"torch": "2"}, "commands": ["python <x> & y"]}
    (output / "conditions.json").write_text(json.dumps(conditions), encoding="utf-8")
    return output


def test_the_report_is_one_self_contained_page(finished):
    text = report.write_report(finished, resamples=8)
    page = (finished / "report.html").read_text(encoding="utf-8")
    references = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')\s>]{1,40})", page)
    assert references and all(item.startswith("data:image/") for item in references)
    assert "python &lt;x&gt; &amp; y" in page
    assert str(finished / "report.html") in text
    for title in ("AUC", "ES-AUC", "DPD", "DEOdds", "AUC, minority"):
        assert title in text and title in page
    assert "fair is better" in text
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    assert summary["metrics"]["ES-AUC"]["fair_better_in"] == 2


def test_compare_is_paired_and_turns_with_the_runs(finished):
    loaded = [results.load_seed(finished / f"seed-{seed}") for seed in (0, 1)]
    turned = [replace(r, runs={"plain": r.runs["fair"], "fair": r.runs["plain"]}) for r in loaded]
    alike = [replace(r, runs={"plain": r.runs["plain"], "fair": r.runs["plain"]}) for r in loaded]
    there, back, same = (results.compare(case, 8) for case in (loaded, turned, alike))
    for a, b, c in zip(there, back, same, strict=True):
        assert a.difference.value == pytest.approx(-b.difference.value)
        assert a.difference.low == pytest.approx(-b.difference.high)
        assert c.difference == results.Interval(0, 0, 0) and c.better == 0
        assert reading.verdict(c) == "no difference"
    sentences = " ".join(reading.sentences(back, turned))
    assert "plain is better" in sentences and "2 seeds only" in sentences


def test_runs_evaluated_on_different_images_are_refused(finished, tmp_path):
    copied = tmp_path / "seed-0"
    copied.mkdir()
    for name in ("data", "plain"):
        (copied / name).symlink_to(finished / "seed-0" / name)
    for name, first in (("fairness.csv", 0), ("predictions.csv", 1)):
        rows = results.read_rows(finished / "seed-0" / "fair" / "evaluation" / name)
        write_rows(copied / "fair" / "evaluation" / name, rows[first:])
    with pytest.raises(ValueError, match="different images"):
        results.load_seed(copied)


# Children


def command(tmp_path, code, epochs=0):
    made = tmp_path / "made"
    return children.Command("a child", ["-c", code], tmp_path / "log" / "c.log", made, epochs)


LINE = "Train Epoch: 1 [1024/1080 (50%)] Batch (t): 0.2 LR: 0.1 Logit Scale: 14 Loss: 2.5 (2.9)"


def test_a_job_runs_and_shows_its_command_once(tmp_path, capsys):
    child = command(tmp_path, f"print('{LINE}'); open(r'{tmp_path / 'made'}', 'w')", 3)
    job = children.Job([child])
    children.run_jobs([job], 1)
    out = capsys.readouterr().out
    assert out.count("OMP_NUM_THREADS=1 python") == 1
    assert "100%" in out and job.done == job.work
    assert LINE in child.log.read_text(encoding="utf-8")


def test_the_progress_line_tells_epoch_and_loss(tmp_path):
    job = children.Job([command(tmp_path, "", 3)], done=3.5, status="a: epoch 2/3, loss 2.50")
    stream = io.StringIO()
    progress = children.Progress([job], stream)
    progress.show()
    assert re.match(r" 50%  0:00 \| about 0:00 to go \| a: epoch 2/3, loss 2.50", stream.getvalue())
    progress.show()  # not a terminal: not again within seconds
    assert stream.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; print('x: error: no such column'); sys.exit(2)", "exit 2.*no such column"),
        ("pass", "left no"),
    ],
)
def test_a_failed_child_is_one_line_with_its_log(tmp_path, code, message):
    child = command(tmp_path, code)
    with pytest.raises(children.ChildError, match=message) as failure:
        children.run_jobs([children.Job([child])], 1)
    assert str(child.log) in str(failure.value) and "\n" not in str(failure.value)


def test_a_failure_stops_the_other_children(tmp_path):
    bad = command(tmp_path, "import time; time.sleep(0.5); raise SystemExit('error: bad')")
    slow = replace(command(tmp_path, "import time; time.sleep(60)"), log=tmp_path / "s.log")
    with pytest.raises(children.ChildError, match="error: bad"):
        children.run_jobs([children.Job([bad]), children.Job([slow])], 2)


def test_the_trainings_differ_in_the_fair_options_only(files):
    plain, fair = (
        run.training(Path("out"), files, 0, kind, 5, 0).arguments for kind in (False, True)
    )
    at = fair.index("--fair-loss")
    extra = fair[at:]
    assert [a for a in extra if a.startswith("--")] == [a for a in extra if a.startswith("--fair-")]
    assert [a.replace("fair", "plain") if a == "fair" else a for a in fair[:at]] == list(plain)
    shown = run.training(Path("out"), files, 0, True, 5, 0).shown()
    assert max(map(len, shown.splitlines())) < 110 or str(files.train) in shown


@pytest.mark.parametrize(
    "arguments", [["--epochs", "0"], ["--jobs", "0"], ["--seeds", "1", "1"], ["--seeds", "-1"]]
)
def test_wrong_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)
    assert "must be" in capsys.readouterr().err
