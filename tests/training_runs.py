"""Runs of open_clip's own training program on the tiny model, and what they leave behind."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from stub_open_clip import registered as registered
from tiny_clip import HAS_LOCAL_DIR

from fairclip_losses.evaluate import load_weights
from fairclip_losses.integrations.events import Callback

BATCH, EPOCHS = 8, 2
# Adam's own eps of 1e-8 makes a step of the rounding of a gradient that is nearly 0.
FIRM_STEPS = ("--eps", "1e-4")
IDLE = ("--fair-weight", "0", "--fair-faulty-sigma", "inf", "--fair-noisy-sigma", "inf")


def saved_loss(logs, name, epoch=EPOCHS):
    """Return the state of the loss that lies beside a run's checkpoint."""
    path = logs / name / "checkpoints" / f"epoch_{epoch}.fair"
    return torch.load(path, weights_only=True)["callbacks"]["FairTrainingCallback"]["loss"]


def weights(logs, name, epoch=EPOCHS):
    return load_weights(logs / name / "checkpoints" / f"epoch_{epoch}.pt")


class Visits(Callback):
    """What the memory must hold: each pair's raw losses of each epoch, by a plain loop."""

    def __init__(self):
        self.epochs = []

    def on_epoch_start(self, state):
        self.epochs.append({})

    def on_loss_end(self, state):
        # Under accumulation each pass over a step's pairs gives their losses anew.
        if state.loss_call or "pair_ids" not in state.loss_inputs:
            return
        ids, losses = state.loss_inputs["pair_ids"], state.loss.last.pair_losses
        for pair, loss in zip(ids.tolist(), losses.tolist(), strict=True):
            self.epochs[-1].setdefault(pair, []).append(loss)

    @property
    def visits(self):
        together = {}
        for epoch in self.epochs:
            for pair, losses in epoch.items():
                together.setdefault(pair, []).extend(losses)
        return together


def assert_remembered(rows, visits):
    """That a report of all pairs has each with its visits and their mean loss."""
    assert {int(row["id"]) for row in rows} == visits.keys() and rows
    for row in rows:
        losses = visits[int(row["id"])]
        assert int(row["visits"]) == len(losses)
        assert float(row["mean_loss"]) == pytest.approx(np.mean(losses), rel=1e-5)


class SeedEpochs(Callback):
    """Starts each epoch from a random state of its own: open_clip does not save its own."""

    def on_epoch_start(self, state):
        torch.manual_seed(state.epoch)


class StopBefore(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch_start(self, state):
        if state.epoch == self.epoch:
            raise KeyboardInterrupt


def arguments(data, logs, name, *more, epochs=EPOCHS):
    return [
        *("--train-data", data["train"], "--model", data["model"]),
        *(("--device", "cpu") if HAS_LOCAL_DIR else ()),  # 2.x has no such flag
        *("--batch-size", str(BATCH), "--epochs", str(epochs), "--workers", "0"),
        *("--warmup", "2", "--lr", "1e-3", "--logs", str(logs), "--name", name),
        # Not open_clip's default, amp, whose scaler skips first steps.
        *("--log-every-n-steps", "2", "--precision", "fp32", *more),
    ]


def assert_same(first, second, where=""):
    """Equal bit for bit, and of the same types, all the way down."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and first.shape == second.shape, where
        bits = (tensor.detach().flatten().view(torch.uint8) for tensor in (first, second))
        assert torch.equal(*bits), where
    elif isinstance(first, dict | list | tuple):
        assert len(first) == len(second), where
        for key in first if isinstance(first, dict) else range(len(first)):
            assert_same(first[key], second[key], f"{where}[{key!r}]")
    else:
        assert first == second, where


def assert_close_weights(first, second):
    """To rounding, of runs with FIRM_STEPS."""
    torch.testing.assert_close(dict(second), dict(first), rtol=1e-5, atol=1e-5)


def pairs_of(logs, name, epoch=EPOCHS, kind="pairs"):
    """The report of all pairs of a run, or of the flagged."""
    return rows_of(logs / name / "checkpoints" / f"{kind}_epoch_{epoch}.csv")


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def one_line(capsys):
    """The error line, which is the last thing on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert sum("error:" in line for line in lines) == 1
    assert lines[-1].startswith("fairclip_losses.train: error: ")
    assert "Traceback" not in "".join(lines)
    return lines[-1]
