"""Runs of open_clip's own training program on the tiny model, and what they leave behind."""

from __future__ import annotations

import contextlib
import csv

import torch
from tiny_clip import HAS_LOCAL_DIR

from fairclip_losses.integrations import events
from fairclip_losses.integrations.events import Callback

BATCH, EPOCHS = 8, 3


@contextlib.contextmanager
def registered(callback):
    """Have a callback in every run of the block."""
    events.register(callback)
    yield callback
    events.default_registry.unregister(callback)


def saved_loss(logs, name, epoch=EPOCHS):
    """Return the state of the loss that lies beside a run's checkpoint."""
    path = logs / name / "checkpoints" / f"epoch_{epoch}.fair"
    return torch.load(path, weights_only=True)["callbacks"]["FairTrainingCallback"]["loss"]


class SeedEpochs(Callback):
    """Starts each epoch from a random state of its own: the host does not save its own."""

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
        # Not the host's default, amp: its scaler skips first steps, of which nothing is recorded.
        *("--log-every-n-steps", "2", "--precision", "fp32", *more),
    ]


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def assert_same_state(first, second):
    """Bit for bit, where NaN equals NaN."""
    assert first.keys() == second.keys()
    for key, value in first.items():
        same = (
            torch.equal(value.nan_to_num(7), second[key].nan_to_num(7))
            if isinstance(value, torch.Tensor)
            else value == second[key]
        )
        assert same, key


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
