"""Training runs in processes of their own that are killed at a named moment.

The processes are forked from a server that has imported everything and computed nothing, so each
starts at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch
from tiny_clip import write_model

from fairclip_losses.integrations import events
from fairclip_losses.integrations.events import Callback

PRELOADED = ["open_clip_train.main", "fairclip_losses.train", "tiny_clip"]


class SeedEpochs(Callback):
    """Starts each epoch from a random state of its own: the host does not save its own."""

    def on_epoch_start(self, state):
        torch.manual_seed(state.epoch)


class Tally(Callback):
    """Keeps what happened, in all processes of a run that is resumed."""

    def __init__(self):
        self.batches, self.evaluations = torch.zeros(3, dtype=torch.int64), []

    def on_batch_end(self, state):
        self.batches[state.epoch] += 1

    def on_eval_end(self, state):
        self.evaluations.append((state.epoch, state.metrics["clip_val_loss"]))

    def state_dict(self):
        return {"batches": self.batches, "evaluations": self.evaluations}

    def load_state_dict(self, state):
        self.batches, self.evaluations = state["batches"].clone(), list(state["evaluations"])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(Callback):
    def __init__(self, moment):
        self.moment = moment

    def on_batch_start(self, state):
        if self.moment == "step" and (state.epoch, state.batch_index) == (1, 1):
            die()

    def on_epoch_end(self, state):  # registered first, thus called last
        if self.moment == "epoch_end" and state.epoch == 1:
            die()


def half_of(value, file):
    """Write the first half of what torch.save would, and die with it."""
    save(value, file)
    if not isinstance(file, str):
        file.flush()
        file = file.name
    os.truncate(file, os.path.getsize(file) // 2)
    die()


save, replace, unlink = torch.save, os.replace, Path.unlink


def install(moment):
    """Make this process kill itself at a moment of the writing of epoch 2."""

    def name_of(file):
        return os.path.basename(file if isinstance(file, str) else getattr(file, "name", ""))

    def own_save(value, file):
        name = name_of(file)
        epoch = value.get("epoch") if isinstance(value, dict) else None
        if epoch == 2 and name in {
            "half_state": ("epoch_2.fair.tmp",),
            "half_checkpoint": ("epoch_2.pt",),
            "half_latest": ("tmp.pt",),
        }.get(moment, ()):
            half_of(value, file)
        save(value, file)
        if moment == "after_checkpoint" and name == "epoch_2.pt":
            die()

    def own_replace(source, target):
        ours = os.path.basename(target) == "epoch_2.fair"
        if ours and moment == "before_replace":
            die()
        replace(source, target)
        if ours and moment == "after_replace":
            die()

    def own_unlink(path, missing_ok=False):
        if moment == "tidy" and path.name == "epoch_1.fair":
            die()
        unlink(path, missing_ok=missing_ok)

    torch.save, os.replace, Path.unlink = own_save, own_replace, own_unlink


def _run(arguments, folder, moment, callbacks):
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    write_model(folder / "tiny")
    if moment:
        install(moment)
    if callbacks is not None:
        from fairclip_losses import train

        for callback in callbacks:
            events.register(callback)
        sys.exit(train.main(arguments))
    import open_clip_train.main

    sys.exit(open_clip_train.main.main(arguments))


def start(arguments, folder, moment=None, callbacks=()):
    """Start a run with these callbacks, or of the host alone; return its process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(arguments, folder, moment, callbacks))
    process.start()
    return process


def run(arguments, folder, moment=None, callbacks=()):
    """Run to the end; return the exit status, -9 where it was killed."""
    process = start(arguments, folder, moment, callbacks)
    process.join(240)
    assert process.exitcode is not None, (folder / "output.txt").read_text()[-2000:]
    return process.exitcode
