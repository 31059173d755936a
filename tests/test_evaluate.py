"""Zero-shot evaluation of a tiny open_clip model, and its command line."""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from tiny_clip import HAS_LOCAL_DIR, as_process, model_name, write_model, write_pairs

from fairclip_losses import evaluate
from fairclip_losses.data import CodeBook, read_table, write_table
from fairclip_losses.evaluate import load_model, load_weights, main, read_run_settings
from fairclip_losses.evaluation.zero_shot import (
    ZeroShotTask,
    evaluate_task,
    zero_shot_probabilities,
)
from fairclip_losses.metrics import fairness_report

PROMPTS = ("a dark picture", "a bright picture")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as a training leaves it, with 24 images and their table."""
    folder = tmp_path_factory.mktemp("run")
    name = write_model(folder / "tiny")
    (folder / "checkpoints").mkdir()
    (folder / "params.txt").write_text(
        f"force_image_size: None\nimage_mean: None\nlr: 1e-05\nmodel: {name}\nname: a: b\n"
    )
    torch.manual_seed(7)  # tells bright from dark, and not perfectly
    model = open_clip.create_model(name)
    with torch.no_grad():
        # An untrained model tells images apart poorly: spread its outputs.
        model.visual.proj.mul_(5)
    checkpoint = {
        "epoch": 3,
        "name": "run",
        "state_dict": {f"module.{key}": value for key, value in model.state_dict().items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-5}]},
    }
    torch.save(checkpoint, folder / "checkpoints" / "epoch_3.pt")

    for image in read_table(write_pairs(folder, 24, "val")).columns["filepath"][::3]:
        Image.open(image).convert("L").save(image)
    return folder


@pytest.fixture(scope="module")
def loaded(run):
    settings = read_run_settings(run / "checkpoints" / "epoch_3.pt")
    return load_model(settings["model"], run / "checkpoints" / "epoch_3.pt", settings=settings)


@pytest.fixture(scope="module")
def task(run):
    return ZeroShotTask.from_table(
        read_table(run / "val.tsv"), label="bright", prompts=PROMPTS, attributes=["sex", "site"]
    )


def command(run, output, *more):
    return [
        *("--checkpoint", str(run / "checkpoints" / "epoch_3.pt")),
        *("--data", str(run / "val.tsv")),
        *("--label", "bright", "--prompts", *PROMPTS, "--attributes", "sex", "site"),
        *("--device", "cpu", "--bootstrap", "20", "--output", str(output), *more),
    ]


# The functions


def by_hand(model, preprocess, tokenizer, files, prompts):
    """Probabilities one image at a time, by the model's own forward pass."""
    model.eval()
    rows = []
    with torch.no_grad():
        for file in files:
            out = model(preprocess(Image.open(file))[None], tokenizer(list(prompts)))
            logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
            rows.append(logits.double().softmax(-1)[0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize(("batch_size", "workers"), [(5, 0), (100, 1)])
def test_probabilities_are_those_of_the_models_forward(loaded, task, batch_size, workers):
    report, predictions = evaluate_task(
        *loaded, task, batch_size=batch_size, workers=workers, n_bootstrap=10
    )
    expected = by_hand(*loaded, task.files, PROMPTS)
    np.testing.assert_allclose(predictions.probabilities, expected, atol=1e-5)
    assert predictions.probabilities.dtype == np.float64
    np.testing.assert_allclose(predictions.probabilities.sum(axis=1), 1, atol=1e-12)
    assert np.ptp(expected[:, 1]) > 0.01
    assert report.auc.value == pytest.approx(
        roc_auc_score(task.labels, predictions.probabilities[:, 1]), abs=1e-12
    )
    groups = {"sex": task.groups[:, 0], "site": task.groups[:, 1]}
    options = {"labels": task.codebook, "n_bootstrap": 10}
    assert report == fairness_report(task.labels, predictions.probabilities, groups, **options)
    np.testing.assert_array_equal(predictions.predicted, predictions.probabilities[:, 1] >= 0.5)


def test_a_code_book_decides_the_groups_and_prompts_follow_the_sorted_classes(run):
    table = read_table(run / "val.tsv")
    table.columns["name"] = ["dark", "bright"] * 12
    book = CodeBook({"sex": ("d", "f", "m")})
    options = {"prompts": ["bright", "dark"], "attributes": ["sex"], "codebook": book}
    task = ZeroShotTask.from_table(table, label="name", **options)
    header = ["id", "file", "label", "prediction", "prob_bright", "prob_dark", "sex"]
    assert task.classes == ("bright", "dark") and task.header() == header
    assert task.labels.tolist() == [1, 0] * 12
    assert np.bincount(task.groups[:, 0] + 1).tolist() == [4, 0, 16, 4]


def test_evaluating_leaves_modes_gradients_and_random_numbers_alone(loaded, task):
    model, preprocess, tokenizer = loaded
    model.train()
    model.visual.eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    evaluate_task(model, preprocess, tokenizer, task, n_bootstrap=2)
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    # After an error too.
    tokens = torch.ones(2, 12, dtype=torch.long)
    with pytest.raises(ValueError, match="expected images, got none"):
        zero_shot_probabilities(model, [], tokens, "cpu")
    assert [module.training for module in model.modules()] == before and torch.is_grad_enabled()
    images = torch.zeros(3, 3, 32, 32)
    images[1] = math.nan
    with pytest.raises(ValueError, match="output for row 2 is not finite"):
        zero_shot_probabilities(model, [images], tokens, "cpu")


def test_an_image_that_cannot_be_read_is_named(loaded, task, tmp_path):
    broken = tmp_path / "broken.png"
    bad = dataclasses.replace(task, files=[*task.files[:3], str(broken), *task.files[4:]])
    # A file that breaks off in the middle opens well and fails at the pixels.
    half = Path(task.files[0]).read_bytes()[:-100]
    for content, message in ((b"no image", "cannot ident"), (half, "")):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=f"row 4: cannot read image '{broken}': {message}"):
            evaluate_task(*loaded, bad)
    for option, wrong in (("batch_size", 0), ("workers", -1), ("n_bootstrap", -1), ("seed", -1)):
        with pytest.raises(ValueError, match=f"{option} must be an integer of . or more, got"):
            evaluate_task(*loaded, bad, **{option: wrong})  # before an image is read


@pytest.mark.parametrize(
    ("mode", "name", "workers"),
    [("I;16", "x.png", 2), ("I;16", "x.tif", 0), ("I;16B", "x.tif", 0), ("I", "x.tif", 0),
     ("F", "x.tif", 0)],
)  # fmt: skip
def test_grey_values_of_more_than_8_bits_are_warned_of_once_with_the_way_out(
    loaded, task, tmp_path, mode, name, workers
):
    values = np.linspace(0, 4095, 32 * 32).reshape(32, 32).astype({"I": "<i4", "F": "f4"}.get(
        mode, ">u2" if mode == "I;16B" else "<u2"))  # fmt: skip
    Image.frombytes(mode, (32, 32), values.tobytes()).save(tmp_path / name)
    files = [*task.files[:3], *[str(tmp_path / name)] * 3, *task.files[6:]]
    deep = dataclasses.replace(task, files=files)
    with pytest.warns(UserWarning, match=rf"^row 4: image '.*{name}' has grey values") as caught:
        evaluate_task(*loaded, deep, n_bootstrap=0, batch_size=4, workers=workers)
    (warning,) = caught
    snippet = str(warning.message).partition(" them, as ")[2].partition("; said")[0]
    with Image.open(tmp_path / name) as image:
        assert image.mode == mode
        known = {"np": np, "Image": Image, "image": image, "low": 0, "high": 4095}
        written = np.asarray(eval(snippet, known).convert("RGB"))[..., 1]
    assert np.abs(written - values / 4095 * 255).max() < 1.01 and written.max() == 255


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "titel"}, "no column 'titel'; the columns are 'pair', 'filepath', 'title'"),
        ({"prompts": ["one"]}, "a prompt for each of two or more classes, got"),
        ({"prompts": ["a", "a"]}, r"another prompt for each class, got \['a', 'a'\]"),
        ({"prompts": ["a", "b", "c"], "label": "title"}, "expected 3 classes, got 24 distinct"),
        ({"attributes": ["race"]}, "no column 'race'"),
        ({"attributes": []}, "expected attribute names"),
        ({"image_key": "title"}, "val.tsv: row 1: no image file 'a "),
        ({"codebook": CodeBook({"sex": ("f", "x")})}, "expected one of 'f', 'x', got 'm' in 4"),
        ({"attributes": ["id"]}, r"attributes named \['id'\]: taken"),
    ],
)
def test_bad_tasks(run, change, message):
    options = {"label": "bright", "prompts": PROMPTS, "attributes": ["sex"], **change}
    table = read_table(run / "val.tsv")
    table.columns["id"] = table.columns["sex"]
    with pytest.raises(ValueError, match=message):
        ZeroShotTask.from_table(table, **options)


# Checkpoints and models


def test_weights_lose_the_prefix_and_a_bare_file_is_a_checkpoint_too(run, tmp_path):
    weights = load_weights(run / "checkpoints" / "epoch_3.pt")
    assert "logit_scale" in weights
    assert not any(key.startswith("module.") for key in weights)
    # SigLIP's bias comes along; a scalar may be stored as a vector of one.
    vector = {"logit_scale": weights["logit_scale"].reshape(1), "logit_bias": torch.tensor(-10.0)}
    torch.save({**weights, **vector}, tmp_path / "bare.pt")
    model, _, _ = load_model(model_name(run / "tiny"), tmp_path / "bare.pt")
    torch.testing.assert_close(model.state_dict()["logit_scale"], weights["logit_scale"])
    assert model.logit_bias.item() == -10


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trap",)


def test_a_file_that_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"state_dict": Trap()}, "trap.pt")
    weights = {"w": torch.ones(2)}
    torch.save({"model": weights, "args": argparse.Namespace(lr=1)}, "args.pt")
    unreadable = "not a checkpoint that torch.load can read"
    for name, message in (
        ("text.pt", f"text.pt: {unreadable}"),
        ("trap.pt", f"trap.pt: {unreadable} without running code of its own: it holds"),
        ("args.pt", f"{unreadable} without running code of its own: it holds argparse.Namespace"),
        ("missing.pt", "no checkpoint file 'missing.pt'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_weights(name)
    assert not (tmp_path / "trap").exists()
    for content, got in (
        ({"epoch": 1}, "got none; its keys are 'epoch'"),
        ({"state_dict": {}}, "got none; its keys are 'state_dict'"),
        (torch.ones(2), "got none$"),
        ({"state_dict": 3}, "got none; its keys are"),
        ({"epoch": 1, "model": weights}, "got them under 'model'; its keys are 'epoch', 'model'"),
        ({"ema": weights, "net": weights}, "got them under 'ema', 'net'"),
        ({"step": torch.ones(1), "net": weights, "loss": {}}, "got them under 'net'; its keys"),
    ):
        torch.save(content, "other.pt")
        with pytest.raises(ValueError, match=f'expected model weights under "state_dict", {got}'):
            load_weights("other.pt")


def named(rename):
    return lambda weights: {rename(key): value for key, value in weights.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"extra": torch.ones(1)}, "1 unknown, such as 'extra'"),
        (lambda w: w | {"text_projection": torch.ones(2, 2)}, "1 of other shape, such as 'text_pr"),
        (lambda w: w.pop("text_projection") is w or w, "1 missing, such as 'text_projection'"),
        (  # beside the tensors something else, as FairLoss has it
            lambda w: named("model.{}".format)(w) | {"model.loss._extra_state": {"total": 1}},
            r"\d+ missing.*; its names begin with 'model\.': take that off$",
        ),
        (named("module.a.b.{}".format), r"\d+ missing.*; its names begin with 'a\.b\.': take that"),
        (named(lambda k: k.replace("visual.", "v.")), r"\d+ missing.*; the file has names such as"),
    ],
)
def test_weights_of_another_model_or_program_are_shown(run, tmp_path, change, message):
    weights = load_weights(run / "checkpoints" / "epoch_3.pt")
    torch.save({"state_dict": change(weights)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="w.pt: expected the weights of '.*', got " + message):
        load_model(model_name(run / "tiny"), tmp_path / "w.pt")


def test_the_settings_of_the_run_are_read_and_decide_the_transform(run):
    checkpoint = run / "checkpoints" / "epoch_3.pt"
    settings = {"image_mean": (0.1, 0.2, 0.3), "force_image_size": [32], "image_std": None}
    _, preprocess, _ = load_model(model_name(run / "tiny"), checkpoint, settings=settings)
    assert tuple(preprocess.transforms[-1].mean) == (0.1, 0.2, 0.3)
    # A model that is registered, as open_clip 2 needs it, has no transform of its own.
    std = (0.5, 0.5, 0.5) if HAS_LOCAL_DIR else open_clip.constants.OPENAI_DATASET_STD
    assert tuple(preprocess.transforms[-1].std) == std
    # The image size is not that of the position embedding in the weights.
    with pytest.raises(ValueError, match=r"of other shape, such as 'visual\.positional_embedding'"):
        load_model(model_name(run / "tiny"), checkpoint, settings={"force_image_size": [64]})
    read = read_run_settings(checkpoint)
    assert read["model"] == model_name(run / "tiny") and read["name"] == "a: b"
    assert read["lr"] == 1e-5 and read["image_mean"] is None
    assert read_run_settings(checkpoint.parent / "none" / "epoch_1.pt") == {}


# The command


def test_command_prints_a_table_and_writes_three_files(run, tmp_path, capsys, loaded, task):
    assert main(command(run, tmp_path / "out")) == 0
    captured = capsys.readouterr()
    assert captured.err == (
        "fairclip_losses.evaluate: warning: attribute 'sex': 2 groups in 24 rows, some too small "
        "to be compared ('m' 4, 'f' 16); bin or merge them\n"
    )
    assert captured.out.startswith(f"{model_name(run / 'tiny')}, ")
    for text in ("24 samples, binary", "20 resamples", "ES-AUC", "AUC, f", "4 unknown"):
        assert text in captured.out

    out = tmp_path / "out"
    assert len(list(out.iterdir())) == 3
    report, predictions = evaluate_task(*loaded, task, n_bootstrap=20)
    content = json.loads((out / "fairness.json").read_text())
    assert content["prompts"] == list(PROMPTS) and content["classes"] == ["0", "1"]
    assert {key: content[key] for key in report.to_dict()} == report.to_dict()

    rows = read_table(out / "fairness.csv", ",")
    assert len(rows) == len(report.to_rows())
    assert float(rows.columns["value"][0]) == report.auc.value
    written = read_table(out / "predictions.csv", ",").columns
    assert list(written) == task.header() and written["file"] == task.files
    numbers = {"id": range(24), "label": task.labels, "prediction": predictions.predicted}
    for name, expected in numbers.items():
        assert written[name] == list(map(str, expected))
    found = np.array(written["prob_1"], float)
    np.testing.assert_allclose(found, predictions.probabilities[:, 1], rtol=1e-8)
    assert written["sex"] == read_table(run / "val.tsv").columns["sex"]


def test_crossed_prompts_are_said_and_one_group_has_no_gap_unless_minus_one_is_a_label(
    run, tmp_path, capsys
):
    lines = (run / "val.tsv").read_text().splitlines()
    coded = [f"{line}\t{'Male' if not row else row % 2 * 2 - 1}" for row, line in enumerate(lines)]
    (tmp_path / "coded.tsv.gz").write_bytes(gzip.compress("\n".join(coded).encode()))
    arguments = replaced(command(run, tmp_path), "--data", str(tmp_path / "coded.tsv.gz"))
    arguments = replaced(arguments, "--prompts", *reversed(PROMPTS))
    warning = "fairclip_losses.evaluate: warning: "
    assert main(replaced(arguments, "--attributes", "Male")) == 0
    captured = capsys.readouterr()
    lone = "attribute 'Male': one known group alone, '1' (12 of 24 rows, 12 unknown): there is no "
    assert captured.err.splitlines()[0] == (
        f"{warning}{lone}gap between groups; where -1 is a group, give the labels: Male=-1,1"
    )
    crossed = r"the AUC of 0\.0.. is far below 0\.5: prompts and classes may be crossed "
    crossed += r"\('a bright picture' for class '0', 'a dark picture' for class '1'\)$"
    assert re.search(crossed, captured.err)
    assert captured.err.count("\n") == 2 and captured.out.count("n/a") == 6
    content = json.loads((tmp_path / "fairness.json").read_text())["attributes"]["Male"]
    assert content["demographic_parity_difference"]["value"] is None

    assert main(replaced(arguments, "--attributes", "Male=-1,1", "sex=m,*")) == 0
    captured = capsys.readouterr()
    assert "attribute 'sex': one known group alone, 'm' (4 of 24 rows, 20 unknown)" in captured.err
    assert "'Male'" not in captured.err
    content = json.loads((tmp_path / "fairness.json").read_text())["attributes"]["Male"]
    assert [(g["label"], g["count"]) for g in content["groups"]] == [("-1", 12), ("1", 12)]
    assert content["demographic_parity_difference"]["value"] is not None
    assert read_table(tmp_path / "predictions.csv", ",").column("Male")[:2] == ["1", "-1"]


def test_command_takes_a_model_name_and_low_precision_and_writes_beside_the_checkpoint(
    run, tmp_path, capsys, loaded, task
):
    shutil.copy(run / "checkpoints" / "epoch_3.pt", tmp_path / "alone.pt")
    arguments = command(run, "", "--model", model_name(run / "tiny"), "--precision", "bf16")
    arguments = replaced(arguments, "--checkpoint", str(tmp_path / "alone.pt"))
    assert main(replaced(arguments, "--output")) == 0
    _, predictions = evaluate_task(*loaded, task, n_bootstrap=0)
    written = read_table(tmp_path / "predictions.csv", ",").columns
    found = np.array(written["prob_1"], float)
    np.testing.assert_allclose(found, predictions.probabilities[:, 1], atol=0.1)


def replaced(arguments, option, *values):
    """Give an option other values; no values: take the option away."""
    at = arguments.index(option) if option in arguments else len(arguments)
    later = (i for i in range(at + 1, len(arguments)) if arguments[i].startswith("--"))
    new = [option, *values] if values else []
    return [*arguments[:at], *new, *arguments[next(later, len(arguments)) :]]


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("--checkpoint", ["missing.pt"], "no checkpoint file 'missing.pt'"),
        ("--data", ["no.csv"], "no.csv: cannot read the table: No such file or directory"),
        ("--label", ["y"], "no column 'y'"),
        ("--label", [], "the following arguments are required: --label"),
        ("--prompts", ["one"], "expected a prompt for each of two or more classes"),
        ("--attributes", ["race"], "no column 'race'"),
        ("--attributes", ["sex=f"], "'sex': expected one of 'f', got 'm' in 4 rows, first in row"),
        ("--attributes", ["sex=f,NA"], "--attributes sex=f,NA: expected labels separated by com"),
        ("--csv-separator", [","], "; is it --csv-separator $'\\t' ?"),
        ("--device", ["nonsense"], "cannot use device 'nonsense'"),
        ("--bootstrap", ["-1"], "n_bootstrap must be an integer of 0 or more, got -1"),
        ("--bootstrap", ["many"], "argument --bootstrap: invalid int value: 'many'"),
        ("--output", ["{run}/val.tsv"], "val.tsv: File exists"),
        ("--model", ["ViT-Z"], "open_clip cannot build model 'ViT-Z': "),
        ("--model", ["local-dir:{run}/nowhere"], "cannot build model 'local-dir:"),
        ("--checkpoint", ["{run}/val.tsv"], "say which model this is with --model"),
    ],
)
def test_every_mistake_is_one_line(run, tmp_path, capsys, option, values, message):
    arguments = command(run, tmp_path / "out")
    arguments = replaced(arguments, option, *(v.format(run=run) for v in values))
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and not list(tmp_path.rglob("*.json"))
    assert captured.err.startswith("fairclip_losses.evaluate: error: ")
    assert captured.err.count("\n") == 1 and message in captured.err


def test_an_image_error_in_a_worker_is_one_line(run, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    rows = [[broken, 0, "f"], [run / "val_1.png", 1, "f"]]
    write_table(tmp_path / "t.csv", ["filepath", "bright", "sex"], rows, "\t")
    arguments = command(run, tmp_path / "out", "--workers", "1", "--attributes", "sex")
    assert main(replaced(arguments, "--data", str(tmp_path / "t.csv"))) == 2
    start = f"fairclip_losses.evaluate: error: row 1: cannot read image '{broken}': cannot identify"
    message = capsys.readouterr().err
    assert message.startswith(start) and message.count("\n") == 1


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for default in ("filepath", "tab", "64", "0", "auto", "fp32", "0.5", "1000", "0.95",
                    "beside the checkpoint", "that of the run's params.txt"):  # fmt: skip
        assert f"(default: {default})" in shown
    optional = [action for action in evaluate._parser()._actions if not action.required]
    assert shown.count("(default: ") == len(optional) - 1  # --help has none


def test_an_unexpected_error_is_one_line_unless_debugged(run, tmp_path, capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of luck\nmore")

    monkeypatch.setattr(evaluate, "load_model", broken)
    assert main(command(run, tmp_path)) == 1
    assert capsys.readouterr().err == (
        "fairclip_losses.evaluate: error: unexpected RuntimeError: out of luck "
        "(--debug shows the traceback)\n"
    )
    with pytest.raises(RuntimeError, match="out of luck"):
        main(command(run, tmp_path, "--debug"))


def test_as_a_module_with_a_warning(run, tmp_path):
    """In a process of its own: exit code, output, a warning in one line, open_clip kept quiet."""
    rows = [[run / f"val_{row}.png", row == 1, "ffmm"[row]] for row in range(4)]
    write_table(tmp_path / "t.csv", ["filepath", "bright", "sex"], rows, "\t")
    arguments = replaced(command(run, tmp_path / "out"), "--data", str(tmp_path / "t.csv"))
    module, environment = as_process(run / "tiny", "fairclip_losses.evaluate")
    result = subprocess.run(
        [sys.executable, *module, *replaced(arguments, "--attributes", "sex")],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    # open_clip 2 pulls in what has something to say of old versions, and draws other weights.
    start = "fairclip_losses.evaluate: warning: "
    lines = result.stderr.splitlines()
    said = [line.removeprefix(start) for line in lines if HAS_LOCAL_DIR or line.startswith(start)]
    few, alone, *crossed = said
    assert "2 groups in 4 rows" in few
    assert alone == "attribute 'sex': group 'm' holds one class only: its AUC is NaN"
    assert len(crossed) == 1 and "crossed" in crossed[0] if HAS_LOCAL_DIR else len(crossed) < 2
    assert "AUC, m" in result.stdout and "n/a" in result.stdout
    text = (tmp_path / "out" / "fairness.json").read_text()
    assert "NaN" not in text
