"""The training command on open_clip's real training program, end to end on a tiny model."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from open_clip import CoCaLoss
from PIL import Image
from tiny_clip import HAS_LOCAL_DIR, write_data, write_pairs
from training_runs import (
    BATCH,
    EPOCHS,
    FIRM_STEPS,
    IDLE,
    Visits,
    arguments,
    assert_close_weights,
    assert_remembered,
    assert_same,
    one_line,
    pairs_of,
    registered,
    weights,
)

from fairclip_losses import train
from fairclip_losses.data import CodeBook
from fairclip_losses.integrations.csv_pairs import NamedDataset
from fairclip_losses.integrations.events import Callback, TrainState
from fairclip_losses.integrations.fair_training import FairTrainingCallback
from fairclip_losses.integrations.flags import split_flags

program = pytest.importorskip("open_clip_train.main")
CsvDataset = pytest.importorskip("open_clip_train.data").CsvDataset

# open_clip's own warnings (no accelerator to pin memory for, and such) are not ours to fix.
pytestmark = pytest.mark.filterwarnings("default")

PAIRS = 40
STEPS = PAIRS // BATCH


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), PAIRS, val=24)


class StepRecorder(Visits):
    """The loss terms of every step too."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_loss_end(self, state):
        super().on_loss_end(state)
        self.steps.append({name: float(value.detach()) for name, value in state.losses.items()})


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def record():
    with registered(StepRecorder()) as callback:
        yield callback


FAIR = ("--fair-loss", "--fair-attributes", "sex", "site")
SELDOM = ("--val-frequency", str(EPOCHS), *FIRM_STEPS)
PROMPTS = ("--fair-eval-prompts", "a dark picture", "a bright picture")


@pytest.fixture(scope="module")
def fair_run(data, tmp_path_factory):
    """One whole run with everything on, which several tests look at."""
    logs = tmp_path_factory.mktemp("fair")
    flags = (
        *FAIR, "--fair-faulty-sigma", "1", "--fair-noisy-sigma", "1.5", "--fair-save-pairs",
        "--fair-queue", "4", "--report-to", "tensorboard", "--val-data", data["val"],
        "--fair-eval-label", "bright", *PROMPTS,
    )  # fmt: skip
    with registered(StepRecorder()) as callback:
        assert train.main(arguments(data, logs, "run", *flags)) == 0
    return logs, callback


@pytest.fixture(scope="module")
def plain_run(data, tmp_path_factory):
    """Trains under flags, in the folder of a run of the patched program without ours."""
    logs = tmp_path_factory.mktemp("plain")

    def run(name, *flags, main=train.main):
        # open_clip evaluates the last epoch alone.
        return main(arguments(data, logs, name, "--val-data", data["val"], *SELDOM, *flags))

    assert run("ours") == 0
    return logs, run


@pytest.fixture(scope="module")
def one_epoch(data, tmp_path_factory):
    """A run to be resumed, with a queue."""
    logs = tmp_path_factory.mktemp("one_epoch")
    flags = (*FAIR, "--fair-queue", "4")
    assert train.main(arguments(data, logs, "run", *flags, epochs=1)) == 0
    return logs / "run"


def test_without_the_flag_training_is_upstreams_bit_for_bit(plain_run):
    logs, run = plain_run
    run("upstream", main=program.main)
    assert_same(weights(logs, "upstream"), weights(logs, "ours"))
    own = ("name", "log_path", "checkpoint_path")
    upstream, ours = (
        [line for line in (logs / name / "params.txt").open() if not line.startswith(own)]
        for name in ("upstream", "ours")
    )
    assert upstream == ours


def test_a_fair_loss_that_flags_nothing_trains_the_plain_weights(plain_run, record):
    logs, run = plain_run
    assert run("idle", *FAIR, *IDLE) == 0
    assert len(record.steps) == EPOCHS * STEPS
    assert {step["fairness_loss"] for step in record.steps} == {0.0}
    assert_close_weights(weights(logs, "ours"), weights(logs, "idle"))


def test_plain_siglip_equals_the_idle_fair_loss(data, tmp_path):
    for name, flags in (("plain", ()), ("idle", (*FAIR, *IDLE))):
        flags = ("--siglip", *FIRM_STEPS, *flags)
        assert train.main(arguments(data, tmp_path, name, *flags, epochs=1)) == 0
    assert_close_weights(weights(tmp_path, "plain", 1), weights(tmp_path, "idle", 1))


def test_fairness_is_evaluated_when_open_clip_evaluates_and_changes_no_training(plain_run):
    logs, run = plain_run
    groups = ("--fair-attributes", "sex=m,x,*", "site=1,0")
    assert run("evaluated", *groups, "--fair-eval-label", "bright", *PROMPTS) == 0
    assert_same(weights(logs, "ours"), weights(logs, "evaluated"))
    for name in ("results.jsonl", "fair_results.jsonl"):
        lines = lines_of(logs / "evaluated" / "checkpoints" / name)
        assert [line["epoch"] for line in lines] == [EPOCHS]
    groups = [name.partition("/")[0] for name in lines[0] if "=" in name]
    assert list(dict.fromkeys(groups)) == ["sex=m", "site=1", "site=0"]


def test_an_existing_run_is_not_overwritten(plain_run):
    logs, run = plain_run
    saved = weights(logs, "ours")
    assert run("ours", *FAIR) == 1
    assert_same(saved, weights(logs, "ours"))


def test_the_miner_remembers_each_pair_by_its_row_under_shuffling(fair_run):
    logs, record = fair_run
    rows = pairs_of(logs, "run")
    assert_remembered(rows, record.visits)
    assert sorted(int(row["id"]) for row in rows) == list(range(PAIRS))
    assert {row["visits"] for row in rows} == {str(EPOCHS)}


def test_flagged_pairs_are_written_every_epoch(fair_run, data):
    logs, _ = fair_run
    with open(data["train"], newline="") as file:
        source = list(csv.DictReader(file, delimiter="\t"))
    for epoch in range(1, EPOCHS + 1):
        flagged = pairs_of(logs, "run", epoch, "flagged")
        everything = pairs_of(logs, "run", epoch)
        assert flagged == [row for row in everything if row["kind"] != "clean"]
        history = np.array([float(row["mean_loss"]) for row in everything])
        z_score = (history - history.mean()) / history.std()
        for row, z in zip(everything, z_score, strict=True):
            assert float(row["z_score"]) == pytest.approx(z, abs=2e-3)
            kind = "faulty" if z >= 1 else "noisy" if z <= -1.5 else "clean"
            assert row["kind"] == kind
            origin = source[int(row["id"])]
            assert (row["file"], row["caption"]) == (origin["filepath"], origin["title"])
            assert (row["sex"], row["site"]) == (origin["sex"], origin["site"])
    assert flagged


def test_codes_are_saved_and_the_log_shows_terms_flags_and_rates(fair_run):
    logs, record = fair_run
    book = json.loads((logs / "run" / "fair_codebook.json").read_text())
    assert book == {"sex": ["f", "m"], "site": ["0", "1"]}
    text = (logs / "run" / "out.log").read_text()
    for who, rows in (("loss", PAIRS), ("Eval", 24)):
        assert text.count(f"WARNING | Fair {who}: attribute 'sex': 2 groups in {rows} rows, ") == 1
    kinds = [row["kind"] for row in pairs_of(logs, "run", kind="flagged")]
    flagged = f"flagged noisy {kinds.count('noisy')} faulty {kinds.count('faulty')} of {PAIRS}"
    terms = ("Contrastive_loss:", "Fairness_loss:", "distance/sex=m")
    for part in (*terms, f"{flagged} pairs seen | flag rate sex=f"):
        assert part in text
    terms = {"contrastive_loss", "fairness_loss"}
    assert all(step.keys() - {"loss"} == terms for step in record.steps)
    assert any(step["fairness_loss"] > 0 for step in record.steps)


def test_tensorboard_shows_terms_flags_rates_and_metrics(fair_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs, _ = fair_run
    events_file = EventAccumulator(str(logs / "run" / "tensorboard"))
    events_file.Reload()
    tags = set(events_file.Tags()["scalars"])
    fair = ("flagged_noisy", "flagged_faulty", "flag_rate/sex=f", "distance/site=1")
    expected = {"contrastive_loss", "fairness_loss", *(f"fair/{name}" for name in fair)}
    assert tags >= {f"train/{name}" for name in expected} | {"val/fair/sex/es_auc"}
    assert [event.step for event in events_file.Scalars("val/fair/auc")] == [1, 2]


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_wandb_gets_the_same_scalars_whatever_the_preset(data, tmp_path, monkeypatch, preset):
    logged = []
    fake = SimpleNamespace(log=lambda scalars, step=None: logged.append((step, scalars)))
    for name in ("init", "save", "finish"):
        setattr(fake, name, lambda *args, **kwargs: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(program, "wandb", fake)
    monkeypatch.setattr("open_clip_train.train.wandb", fake)
    flags = (*FAIR, "--fair-preset", preset, "--report-to", "wandb")
    assert train.main(arguments(data, tmp_path, "wandb", *flags)) == 0
    fair = [(step, scalars) for step, scalars in logged if "train/fair/distance/sex=f" in scalars]
    plain = [step for step, scalars in logged if "train/contrastive_loss" in scalars]
    assert [step for step, _ in fair] == plain
    assert "train/fair/flagged_faulty" in fair[-1][1] or preset == "official"


def test_fairness_metrics_of_an_epoch_are_those_of_the_evaluate_command(fair_run, data, tmp_path):
    from fairclip_losses import evaluate

    logs, _ = fair_run
    folder = logs / "run" / "checkpoints"
    lines = lines_of(folder / "fair_results.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2]
    command = [
        *("--checkpoint", str(folder / f"epoch_{EPOCHS}.pt"), "--data", data["val"], "--label"),
        *("bright", "--prompts", *PROMPTS[1:], "--attributes", "sex", "site", "--device", "cpu"),
        *("--bootstrap", "10", "--output", str(tmp_path)),
    ]
    assert evaluate.main(command) == 0
    report = json.loads((tmp_path / "fairness.json").read_text())
    found = report.get("report", report)
    assert lines[-1]["auc"] == pytest.approx(found["auc"]["value"], abs=1e-12)


def test_accumulation_records_each_pair_once_a_step_by_its_own_id(data, tmp_path, record):
    flags = (*FAIR, "--accum-freq", "2", "--fair-save-pairs", "--fair-queue", "4")
    assert train.main(arguments(data, tmp_path, "accum", *flags, "--fair-id-key", "pair")) == 0
    assert len(record.steps) == EPOCHS * (STEPS // 2) * 2
    # Both passes of a step see the same queue.
    terms = [step["fairness_loss"] for step in record.steps]
    assert terms[0::2] == pytest.approx(terms[1::2], rel=1e-4)
    rows = pairs_of(tmp_path, "accum")
    assert_remembered(rows, record.visits)
    assert all(row["caption"].endswith(f"number {(1000 - int(row['id'])) // 7}") for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--fair-queue", "8"), "of --fair-queue 4, this run of --fair-queue 8"),
        (("--fair-score", "similarity"), "of --fair-score loss, this run of --fair-score simil"),
        (("--fair-id-key", "pair"), "of --fair-id-key not given, this run of --fair-id-key pair"),
        (("--fair-attributes", "sex"), "has the groups"),
        (("--fair-preset", "paper"), "of --fair-preset aligned, this run of --fair-preset paper"),
        (("--fair-loss", "sinkhorn"), "of --fair-loss dbpm sinkhorn"),
        (("--csv-caption-key", "site"), "of --train-data 40 rows"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_flag(
    data, one_epoch, tmp_path, capsys, change, message
):
    shutil.copytree(one_epoch, tmp_path / "run")
    flags = (*FAIR, "--fair-queue", "4", *change, "--resume", "latest")
    again = arguments(data, tmp_path, "run", *flags, epochs=2)
    assert train.main(again) == 2
    line = one_line(capsys)
    assert message in line and "--fair-fresh-state" in line
    book = "fair_codebook.json"
    assert (tmp_path / "run" / book).read_text() == (one_epoch / book).read_text()
    if "--fair-attributes" in change:
        assert train.main([*again, "--fair-fresh-state"]) == 0


def test_a_saved_state_that_lacks_what_it_must_have_is_refused(data, one_epoch, tmp_path, capsys):
    shutil.copytree(one_epoch, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "epoch_1.fair"
    content = torch.load(path, weights_only=True)
    whole = content["callbacks"]["FairTrainingCallback"]
    flags = (*FAIR, "--fair-queue", "4", "--resume", "latest")
    for state, message in (
        ({key: value for key, value in whole.items() if key != "labels"}, "state lacks labels"),
        (whole | {"settings": None, "loss": None}, "state lacks settings, loss"),
        (whole | {"loss": {}}, "state does not fit this run: Error(s) in loading state_dict"),
    ):
        content["callbacks"]["FairTrainingCallback"] = state
        torch.save(content, path)
        assert train.main(arguments(data, tmp_path, "run", *flags, epochs=2)) == 2
        line = one_line(capsys)
        assert message in line and "; add --fair-fresh-state" in line


def test_a_fairness_term_beside_captions_alone_is_warned_of(caplog):
    options, _ = split_flags(["--fair-loss", "sinkhorn", "--fair-attributes", "sex"])
    callback = FairTrainingCallback(options)
    codes, book = torch.zeros(4, 1, dtype=torch.int64), CodeBook({"sex": ("f", "m")})
    callback.source = SimpleNamespace(num_pairs=None, codebook=book, codes=codes)
    args = SimpleNamespace(epochs=1, device="cpu", rank=0, batch_size=4, accum_freq=1, world_size=1)
    data = {"train": SimpleNamespace(dataloader=SimpleNamespace(num_batches=1))}
    for weight in (1.0, 0.0):
        loss = CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=weight)
        callback.on_loss_ready(TrainState(args=args, data=data, loss=loss))
        warned = "the fairness term alone trains the scores that it compares" in caplog.text
        assert warned == (weight == 0)


def rewritten(data, tmp_path, change, table="train"):
    """A copy of a table, the training's, with its lines changed."""
    path = tmp_path / "changed.tsv"
    with open(data[table]) as file:
        path.write_text("".join(change(file.readlines())))
    return {**data, table: str(path)}


CAPTIONS_ALONE = (*FAIR, "--model", "coca_ViT-B-32", "--coca-contrastive-loss-weight", "0")
EVALUATED = ("--fair-eval-label", "bright", *PROMPTS, "--fair-attributes", "sex")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--fair-loss", "--fair-attributes", "race"), "no column 'race'"),
        (("--fair-loss", "dbpm", "--csv-img-key", "picture"), "no column 'picture'"),
        (("--fair-loss", "dbpm", "--fair-id-key", "title"), "title"),
        (("--fair-loss", "dbpm", "--fair-id-key", "bright"), "bright"),
        ((*FAIR, "--fair-blur", "1e101"), "blur must be 0 or from 1e-100 to 1e100, got 1e+101"),
        ((*FAIR, "--log-every-n-steps", "0"), "--log-every-n-steps must be 1 or more, got 0"),
        ((*FAIR, "--accum-freq", "0"), "--accum-freq must be 1 or more, got 0"),
        ((*FAIR, "--batch-size", "0"), "--batch-size must be 1 or more, got 0"),
        ((*FAIR, "--epochs", "0"), "--epochs must be 1 or more, got 0"),
        ((*FAIR, "--resume", "/no/such.pt"), "--resume: no checkpoint file '/no/such.pt'"),
        ((*FAIR, "--val-data", "/no/such.csv"), "/no/such.csv"),
        ((*FAIR, "--fair-wieght", "1"), "--fair-wieght 1 (did you mean --fair-weight?)"),
        (("--epohcs", "3"), "unrecognized arguments: --epohcs 3"),
        ((*FAIR, "--csv-separator", ";"), "no column 'filepath'"),
        (
            CAPTIONS_ALONE,
            "the contrastive loss, which --coca-contrastive-loss-weight 0 does",
        ),
        (("--fair-loss", "dbpm", "--batch-size", "64"), "40 pairs, fewer than one step"),
        (("--fair-loss", "dbpm", "--train-data", "/no/such.csv"), "/no/such.csv"),
        (("--fair-loss", "dbpm", "--train-data", "x.parquet"), "trains on a table"),
        ((*EVALUATED, "--fair-eval-prompts", "a"), "a prompt for each of two or more classes"),
        (
            (*EVALUATED, "--fair-attributes", "sex=f"),
            "val.tsv: attribute column 'sex': expected one of 'f', got 'm' in ",
        ),
        ((*EVALUATED, "--fair-eval-label", "shade"), "no column 'shade'"),
        ((*EVALUATED, "--val-data", "x.tar"), "takes the validation pairs from a table"),
    ],
)
def test_wrong_input_stops_before_training_with_one_line(data, tmp_path, capsys, flags, message):
    evaluation = ("--val-data", data["val"]) if "--fair-eval-label" in flags else ()
    assert train.main(arguments(data, tmp_path, "bad", *evaluation, *flags)) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "bad").exists()


def replaced(old, new):
    return lambda lines: [line.replace(old, new) for line in lines]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:1], "header"),
        (lambda lines: [], "empty"),
        (lambda lines: [*lines[:5], "7\tx\n", *lines[5:]], "row"),
        (replaced("\t1\t", "\t0.5\t"), "0.5"),
        (replaced("filepath", "filepath "), "name of column 'filepath' has white space around it"),
        (replaced("title", " title"), "the name of column 'title' has white space around it"),
        (replaced("train_3.png", "train_3.png "), "row 4: white space around the image file '"),
        (replaced("train_3.png", "gone.png"), "row 4: no image file"),
    ],
)
def test_a_broken_table_stops_before_training(data, tmp_path, capsys, change, message):
    broken = rewritten(data, tmp_path, change)
    assert train.main(arguments(broken, tmp_path, "bad", *FAIR)) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "bad").exists()


BROKEN = {
    "no picture": lambda file: file.write_bytes(b"no picture"),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-900]),
    "gone": Path.unlink,
}
MESSAGES = {
    "no picture": "UnidentifiedImageError: cannot ident",
    "cut": "OSError: image file is tr",
    "gone": "No such file or directory",
}


def test_what_cannot_be_read_is_named_by_row_and_file(tmp_path):
    table = write_pairs(tmp_path, len(BROKEN), "few")
    rows = CsvDataset(str(table), np.asarray, "filepath", "title", tokenizer=list)
    named = NamedDataset(rows, "few.tsv")
    for row, kind in enumerate(BROKEN):
        assert len(named) == 3 and named[row][1] == rows[row][1]
        BROKEN[kind](Path(rows.images[row]))
        message = f"few.tsv: row {row + 1}: cannot read image '{rows.images[row]}': "
        with pytest.raises(ValueError, match=re.escape(message + MESSAGES[kind])):
            named[row]


@pytest.mark.parametrize(
    ("table", "kind", "workers", "asked"),
    [("train", "cut", "2", FAIR), ("val", "gone", "0", FAIR), ("train", "cut", "1", EVALUATED)],
)
def test_a_broken_image_is_named_and_leaves_no_half_checkpoint(
    data, tmp_path, capsys, table, kind, workers, asked
):
    """Broken once all tables have been looked at."""
    picture, image = tmp_path / "own.png", str(Path(data[table]).with_name(f"{table}_3.png"))
    shutil.copy(image, picture)
    broken = rewritten(data, tmp_path, replaced(image, str(picture)), table)
    breaks = Callback()
    breaks.on_epoch_start = lambda state: BROKEN[kind](picture)
    flags = (*asked, "--workers", workers, "--val-data", broken["val"])
    with registered(breaks):
        assert train.main(arguments(broken, tmp_path, "bad", *flags, epochs=1)) == 1
    where = f"changed.tsv: row 4: cannot read image '{picture}': {MESSAGES[kind]}"
    assert where in one_line(capsys)
    assert not list((tmp_path / "bad" / "checkpoints").glob("*.pt"))
    log = (tmp_path / "bad" / "out.log").read_text()
    assert "Traceback" in log and where in log


def test_traps_are_warned_of_at_the_start_once_each(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    deep = tmp_path / "deep.png"
    Image.fromarray(np.arange(1024, dtype="uint16").reshape(32, 32) * 64).save(deep)

    def change(lines):
        for row, sex in ((3, "x"), (5, "f"), (17, "m")):
            image = str(Path(data["train"]).with_name(f"train_{row}.png"))
            cells = lines[row + 1].replace(image, str(deep)).split("\t")
            lines[row + 1] = "\t".join([*cells[:3], sex, *cells[4:]])
        return lines

    changed = rewritten(data, tmp_path, change)
    flags = ("--fair-loss", "--fair-attributes", "sex", "--warmup", "100", "--workers", "2")
    flags += ("--device", "cuda") if HAS_LOCAL_DIR else ()
    assert train.main(arguments(changed, tmp_path, "run", *flags)) == 0
    log = (tmp_path / "run" / "out.log").read_text()
    said = [line.partition("| Fair loss: ")[2] for line in log.splitlines() if "WARNING" in line]
    said = [line for line in said if line]
    assert "3 groups in 40 rows, some too small to be compared ('x' 1, " in said.pop(0)
    assert said[0] == (
        "--warmup 100 is longer than the 10 steps of the run, whose learning rate ends at 10.00% "
        "of --lr; give --warmup 1 or so"
    )
    if HAS_LOCAL_DIR:
        expected = "--device cuda is not there: the run trains on cpu; give --device cpu if that is"
        assert said.pop(1).startswith(expected)
    assert "a batch of 8 holds fewer than 2 of it" in said[1]
    assert "sex=x (1 of 40 pairs, 0.2 a batch); add --fair-queue 8, " in said[1]
    assert re.match(rf"\S+changed.tsv: row (4|6|18): image '{deep}' has grey values", said[2])
    assert len(said) == 3  # of data without them test_webdataset holds that nothing is said


def test_a_poisoned_step_does_not_enter_the_memory(data, tmp_path):
    class Poison(Callback):
        def on_batch_start(self, state):
            self.saved = {k: v.clone() for k, v in state.model.state_dict().items()}

        def on_loss_start(self, state):
            if state.batch_index == 1:
                features = state.loss_inputs["image_features"]
                state.loss_inputs["image_features"] = features * float("nan")

        def on_batch_end(self, state):
            if state.batch_index == 1:
                state.model.load_state_dict(self.saved)
                state.optimizer.state.clear()

    with registered(Poison()):
        flags = (*FAIR, "--fair-save-pairs", "--fair-queue", "4")
        assert train.main(arguments(data, tmp_path, "nan", *flags, epochs=1)) == 0
    rows = pairs_of(tmp_path, "nan", 1)
    assert len(rows) == PAIRS - BATCH
    assert all(np.isfinite(float(row["mean_loss"])) for row in rows)


@pytest.mark.parametrize(
    ("batch", "got"), [(lambda batch: batch[:2], "2 items"), (lambda batch: None, "NoneType")]
)
def test_a_callback_that_loses_whose_pairs_they_are_is_one_line(data, tmp_path, capsys, batch, got):
    replaces = Callback()
    replaces.on_batch_start = lambda state: setattr(state, "batch", batch(state.batch))
    with registered(replaces):
        assert train.main(arguments(data, tmp_path, "run", *FAIR)) == 2
    assert one_line(capsys).endswith(f"expected (images, texts, pairs), got {got}")
