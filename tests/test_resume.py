"""A run killed with SIGKILL and resumed equals the uninterrupted one."""

from __future__ import annotations

import signal
import time

import pytest
import torch
from killed_runs import DieAt, RaiseIn, Tally, output_of, run, run_two_processes
from tiny_clip import write_data
from training_runs import BATCH, SeedEpochs, assert_same, pairs_of
from training_runs import arguments as of_open_clip

pytest.importorskip("open_clip_train.main")

PAIRS, EPOCHS = 16, 3
SIGMAS = ("--fair-faulty-sigma", "1", "--fair-noisy-sigma", "1")
FAIR = ("--fair-loss", "--fair-attributes", "sex", "site", "--fair-queue", "4", *SIGMAS)
FREQUENT = ("--save-frequency", "1")
RECENT = ("--save-frequency", "0", "--save-most-recent")
DELETING = (*FREQUENT, "--delete-previous-checkpoint")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), PAIRS, val=4)


def arguments(data, logs, *more, evaluated=True):
    more = (*(("--val-data", data["val"]) if evaluated else ()), "--precision", "amp", *more)
    return of_open_clip(data, logs, "run", *more, epochs=EPOCHS)


def callbacks(moment=None):
    return DieAt(moment), SeedEpochs(), Tally()


def checkpoints(logs):
    return logs / "run" / "checkpoints"


def load(path):
    """A checkpoint of open_clip; the oldest one's holds NumPy numbers."""
    return torch.load(path, weights_only=False)


def end_of(logs):
    """The last checkpoint, the state beside it and, where pairs were mined, the flagged."""
    folder = checkpoints(logs)
    checkpoint = load(folder / f"epoch_{EPOCHS}.pt")
    states = torch.load(folder / f"epoch_{EPOCHS}.fair", weights_only=True)
    flagged = [path.read_text() for path in folder.glob(f"flagged_epoch_{EPOCHS}.csv")]
    return checkpoint, states, flagged


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """How the uninterrupted run ends."""
    logs = tmp_path_factory.mktemp("whole")
    assert run(arguments(data, logs, *FAIR, *FREQUENT), data["folder"], None, callbacks()) == 0
    checkpoint, states, flagged = end_of(logs)
    assert len(flagged) == 1 and len(flagged[0].splitlines()) > 1  # a pair below the header
    tally = states["callbacks"]["Tally"]
    # Saved after the evaluation, and what it says is of every epoch.
    assert tally["batches"].tolist() == [PAIRS // BATCH] * EPOCHS
    assert [epoch for epoch, _ in tally["evaluations"]] == [1, 2, 3]
    assert int(states["callbacks"]["FairTrainingCallback"]["loss"]["miner.memory.epoch"]) == EPOCHS
    return checkpoint, states, flagged


@pytest.mark.parametrize(
    ("saving", "moment"),
    [(DELETING, "step"), (FREQUENT, "half_state"), (RECENT, "after_replace")],
    ids=["before the state is saved", "in the middle of it", "after it, before the checkpoint"],
)
def test_killed_and_resumed_equals_uninterrupted(data, whole, tmp_path, saving, moment):
    command = arguments(data, tmp_path, *FAIR, *saving)
    assert run(command, data["folder"], moment, callbacks(moment)) == -signal.SIGKILL
    folder = checkpoints(tmp_path)
    assert run([*command, "--resume", "latest"], data["folder"], None, callbacks()) == 0
    assert_same(end_of(tmp_path), whole)
    assert not list(folder.glob("*.tmp"))
    # What is left is what goes with the checkpoints that are left.
    epochs = {load(path)["epoch"] for path in folder.glob("*.pt")}
    assert {int(path.stem.partition("_")[2]) for path in folder.glob("*.fair")} == epochs


def test_the_weights_are_those_of_open_clips_own_resume(data, tmp_path):
    """In one process open_clip does not take up its order of the data, nor do we in its place."""
    ends = []
    for name, own in (("upstream", None), ("ours", (Tally(),))):
        command = arguments(data, tmp_path / name, *FREQUENT)
        assert run(command, data["folder"], "after_checkpoint", own) == -signal.SIGKILL
        assert run([*command, "--resume", "latest"], data["folder"], None, own) == 0
        ends.append(load(checkpoints(tmp_path / name) / f"epoch_{EPOCHS}.pt"))
    assert_same(*ends)


def test_two_processes_killed_and_resumed_equal_the_uninterrupted(data, tmp_path):
    ends = []
    flags = (*FAIR, *FREQUENT, "--batch-size", "4", "--local-loss", "--gather-with-grad")
    for name, moment in (("whole", None), ("cut", "after_checkpoint")):
        # 2.x evaluates in the first process by a forward pass that waits for the others.
        command = arguments(data, tmp_path / name, *flags, "--fair-save-pairs", evaluated=False)
        if moment:
            statuses = run_two_processes(command, data["folder"], moment, callbacks())
            assert statuses[0] == -signal.SIGKILL and statuses[1] != 0
            command += ["--resume", "latest"]
        assert run_two_processes(command, data["folder"], None, callbacks()) == [0, 0]
        ends.append(end_of(tmp_path / name))
        rows = pairs_of(tmp_path / name, "run", EPOCHS)  # one memory, of every process's pairs
        assert [int(row["visits"]) for row in rows] == [EPOCHS] * PAIRS
    assert_same(*ends)


def test_a_callback_that_raises_in_one_process_stops_them_all(data, tmp_path):
    rank = 1
    command = arguments(data, tmp_path, *FAIR, "--batch-size", "4")
    began = time.monotonic()
    statuses = run_two_processes(command, data["folder"], None, (RaiseIn(rank),))
    assert statuses[rank] == 1 and statuses[1 - rank] != 0
    assert time.monotonic() - began < 60  # gloo itself would wait for half an hour
    line = "error: callback RaiseIn failed at batch_end: ValueError: no more of this"
    assert line in output_of(data["folder"], {"RANK": rank}).read_text()
