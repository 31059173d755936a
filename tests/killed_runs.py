"""Training runs in processes of their own that are killed at a named moment.

The processes are forked from a server that has imported everything and computed nothing, so each
starts at once.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import socket
import sys

import torch
from tiny_clip import HAS_LOCAL_DIR, write_model

from fairclip_losses.integrations import events
from fairclip_losses.integrations.events import Callback

PRELOADED = ["open_clip_train.main", "fairclip_losses.train", "tiny_clip", "training_runs"]


class Tally(Callback):
    """Keeps what happened, in all processes of a run that is resumed."""

    def __init__(self):
        self.batches, self.evaluations = torch.zeros(3, dtype=torch.int64), []

    def on_batch_end(self, state):
        self.batches[state.epoch] += 1

    def on_eval_end(self, state):
        self.evaluations.append((state.epoch, state.metrics.get("clip_val_loss")))

    def state_dict(self):
        return {"batches": self.batches, "evaluations": self.evaluations}

    def load_state_dict(self, state):
        self.batches, self.evaluations = state["batches"].clone(), list(state["evaluations"])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class RaiseIn(Callback):
    """Fails in one of several processes, in the middle of an epoch."""

    def __init__(self, rank):
        self.rank = rank

    def on_batch_end(self, state):
        if state.args.rank == self.rank and state.batch_index == 0:
            raise ValueError("no more of this")


class DieAt(Callback):
    def __init__(self, moment):
        self.moment = moment

    def on_batch_start(self, state):
        if self.moment == "step" and (state.epoch, state.batch_index) == (1, 1):
            die()


def install(moment):
    """Make this process kill itself at a moment of the writing of epoch 2."""
    save, replace = torch.save, os.replace

    def own_save(value, file):
        name = os.path.basename(file if isinstance(file, str) else getattr(file, "name", ""))
        save(value, file)
        if moment == "half_state" and name == "epoch_2.fair.tmp":
            file.flush()
            os.truncate(file.name, os.path.getsize(file.name) // 2)
            die()
        if moment == "after_checkpoint" and name == "epoch_2.pt":
            die()

    def own_replace(source, target):
        replace(source, target)
        if moment == "after_replace" and os.path.basename(target) == "epoch_2.fair":
            die()

    torch.save, os.replace = own_save, own_replace


def _run(arguments, folder, moment, callbacks, environment):
    os.environ.update(environment)
    output = os.open(output_of(folder, environment), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if not HAS_LOCAL_DIR:  # 2.x saves NumPy numbers, which newer torch loads on request only
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    torch.set_num_threads(1)
    write_model(folder / "tiny")
    if moment:
        install(moment)
    if callbacks is None:
        import open_clip_train.main

        sys.exit(open_clip_train.main.main(arguments))
    from fairclip_losses import train

    for callback in callbacks:
        events.register(callback)
    sys.exit(train.main(arguments))


def output_of(folder, environment):
    """Where a process writes what it would have shown."""
    return folder / f"output-{environment.get('RANK', 0)}.txt"


def run(arguments, folder, moment=None, callbacks=()):
    """Run with these callbacks, or (None) open_clip alone; return the status, -9 where killed."""
    (status,) = run_together(arguments, folder, moment, callbacks, [{}])
    return status


def run_two_processes(arguments, folder, moment, callbacks):
    """Run two processes over gloo, each with its own callbacks; return their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**world, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    if not HAS_LOCAL_DIR:  # 3.x knows it by the device
        arguments = [*arguments, "--dist-backend", "gloo"]
    return run_together(arguments, folder, moment, callbacks, ranks)


def run_together(arguments, folder, moment, callbacks, environments):
    """Run a process in each environment to its end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes = []
    try:
        for environment in environments:
            own = copy.deepcopy(callbacks)  # or processes would share the memory of their tensors
            own = (arguments, folder, moment, own, environment)
            processes.append(context.Process(target=_run, args=own))
            processes[-1].start()
        for process, environment in zip(processes, environments, strict=True):
            process.join(240)
            text = output_of(folder, environment).read_text()
            assert process.exitcode is not None, text[-2000:]
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]
