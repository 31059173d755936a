"""The study of examples/evidence: planted data, methods, resumed runs and tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "evidence"))

import data
import methods
import study
import tables
import training


@pytest.mark.parametrize("name", ["demo", "mnist", "clean and fair"])
def test_a_condition_plants_what_it_says(name):
    condition = data.CONDITIONS[name]
    splits = data.make_splits(condition, 1)
    train = splits["train"]
    wrong = (train.digit != train.caption_digit).numpy()
    minority = train.group.numpy() == 1
    assert abs(minority.mean() - condition.minority) < 0.02
    for group, share in enumerate(condition.wrong):
        assert abs(wrong[minority == group].mean() - share) < 0.01
    for split in (splits["val"], splits["test"]):
        assert torch.equal(split.digit, split.caption_digit)
    # Of the mean image of a digit, in which the noise has averaged out.
    zeros = [train.images[(train.digit == 0) & (train.group == g)].float() for g in (0, 1)]
    contrast = [float(images.mean(0).std()) for images in zeros]
    assert (contrast[1] < 0.7 * contrast[0]) == condition.poor_images


def test_two_methods_of_one_seed_differ_in_what_they_do_alone():
    """Nothing is flagged in the first epoch, so that mining alone trains as plain training does."""
    condition, settings = data.CONDITIONS["demo"], training.Settings(epochs=1)
    plain, mining = (
        training.train(condition, 3, methods.METHODS[name].make_loss, settings=settings)
        for name in ("plain", "mining")
    )
    assert plain["es_auc"] == mining["es_auc"] > 0.5
    assert "bad_auroc" in mining and "bad_auroc" not in plain


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_every_method_gives_a_loss_of_the_groups(name):
    run = training.Run(training.TrainingData.of(data.CONDITIONS["demo"], 0), 4, 0)
    method = methods.METHODS[name]
    loss = method.make_loss(run)
    draw = torch.Generator().manual_seed(0)
    rows = method.batches(run, 64, draw)
    group = run.data.splits["train"].group
    assert rows.shape == (len(group) // 64, 64)
    if "balanced" in name:
        assert bool((group[rows].float().mean(1) == 0.5).all())
    for batch in rows[:2]:
        image = torch.nn.functional.normalize(torch.randn(64, 8, generator=draw), dim=1)
        image.requires_grad_()
        scale = torch.tensor(10.0)
        text = image.detach().roll(1, 0)
        loss(
            image_features=image, text_features=text, logit_scale=scale, pair_ids=batch,
            groups=group[batch],
        ).backward()  # fmt: skip
        assert bool(torch.isfinite(image.grad).all()) and float(image.grad.abs().sum()) > 0
    loss.end_epoch()


def test_permuted_weights_are_the_miners_dealt_out_anew():
    run = training.Run(training.TrainingData.of(data.CONDITIONS["demo"], 0), 4, 0)
    permuted = methods.METHODS["permuted weights"].make_loss(run).miner
    count = len(run.data.caption)
    losses = 1.0 + torch.rand(count, generator=torch.Generator().manual_seed(1))
    losses[run.data.wrong] += 3.0
    ids = torch.arange(count)
    permuted(losses, ids)
    permuted.end_epoch()
    own = torch.from_numpy(permuted.report().weight).float()
    got = permuted(losses, ids, record=False)
    torch.testing.assert_close(got.sort().values, own.sort().values)
    assert len(own.unique()) > 1 and not torch.equal(got, own)


def test_auroc_is_scikit_learns():
    draw = np.random.default_rng(0)
    bad, score = draw.random(200) < 0.2, draw.integers(0, 12, 200)
    assert training._auroc(bad, score) == pytest.approx(roc_auc_score(bad, score), abs=1e-12)


def test_a_run_takes_up_where_it_stopped_and_draws_its_tables(tmp_path, monkeypatch):
    path = tmp_path / "trainings.jsonl"
    figures = dict.fromkeys(("es_auc", "es_accuracy", "auc", "deodds", "seconds"), 0.5)

    def line(method, seed, **more):
        where = {"condition": "demo", "method": method, "seed": seed, "epochs": 36}
        return where | figures | more

    done = [
        line(m, s, es_auc=0.5 + 0.01 * s * (m == "both"))
        for s in (0, 1, 2)
        for m in ("plain", "both")
    ]
    path.write_text("\n".join(map(json.dumps, done)) + '\n{"condition": "de')
    assert [study.key_of(result) for result in study.read_results(path)] == [
        study.key_of(result) for result in done
    ]
    asked = []
    monkeypatch.setattr(study, "run", lambda jobs, *_: asked.extend(jobs))
    path.write_text("\n".join(map(json.dumps, done)) + "\n")
    assert study.main(["--quick", "--results", str(path)]) == 0
    assert asked == [("demo", m, s, 36) for s in (0, 1) for m in ("plain", "both")]
    table = tables.condition_table(tables.read_frame(path), "demo")
    assert "| both | 3 | +2.0 % [" in table and "plain: ES-AUC 0.500" in table
    assert study.main(["--methods", "magic"]) == 2
