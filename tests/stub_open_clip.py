"""A stand-in for open_clip's training program: its hook points, without open_clip."""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import re
import types

import torch
from torch import nn

from fairclip_losses.integrations.events import Callback, Event, default_registry, register
from fairclip_losses.integrations.open_clip import PROGRAM


class Loader:
    """Four batches of a pair, with the attributes that open_clip's loop reads."""

    num_batches = 4
    num_samples = 8

    def __iter__(self):
        return iter([(torch.full((2,), float(k)), torch.zeros(2)) for k in range(4)])

    def __len__(self):
        return 4


def filled(program, *functions):
    for function in functions:
        setattr(program, function.__name__, function)
    return program


def make_program():
    """A module with the five hook points and a main() that uses them as open_clip's does."""
    program = types.ModuleType(PROGRAM)
    program.seen, program.status = [], None

    def parse_args(argv):
        parser = argparse.ArgumentParser()
        parser.add_argument("--epochs", type=int, default=1)
        parser.add_argument("--accum-freq", type=int, default=1)
        return parser.parse_args(argv)

    def get_data(args, preprocess_fns, epoch=0, tokenizer=None):
        return {"train": types.SimpleNamespace(dataloader=Loader())}

    def create_loss(args):
        return lambda image_features, output_dict: {"contrastive_loss": image_features.sum()}

    def train_one_epoch(
        model, data, loss, epoch, optimizer, scaler, scheduler, dist_model, args, tb_writer=None
    ):
        for i, batch in enumerate(data["train"].dataloader):
            images, _texts = batch
            if (i + 1) % args.accum_freq == 0:
                for _ in range(args.accum_freq):
                    program.seen.append(loss(image_features=images, output_dict=True))

    def evaluate(model, data, epoch, args, tb_writer=None, tokenizer=None):
        return {"epoch": epoch}

    def main(argv):
        args = program.parse_args(argv)
        data = program.get_data(args, (None, None), epoch=0, tokenizer=None)
        loss = program.create_loss(args)
        program.args = args
        for epoch in range(args.epochs):
            program.train_one_epoch(None, data, loss, epoch, None, None, None, None, args)
            program.evaluate(None, data, epoch + 1, args)
        return program.status

    return filled(program, parse_args, get_data, create_loss, train_one_epoch, evaluate, main)


def make_saving_program():
    """One whose main() trains a small model, and saves and resumes by open_clip's rules."""
    program = make_program()

    def parse_args(argv):
        parser = argparse.ArgumentParser()
        parser.add_argument("--epochs", type=int, default=3)
        parser.add_argument("--logs", default="")
        parser.add_argument("--resume")
        parser.add_argument("--save-frequency", type=int, default=1)
        for flag in ("--save-most-recent", "--delete-previous-checkpoint", "--val"):
            parser.add_argument(flag, action="store_true")
        args = parser.parse_args(argv)
        args.accum_freq = 1
        return args

    def get_data(args, preprocess_fns, epoch=0, tokenizer=None):
        data = {"train": types.SimpleNamespace(dataloader=Loader())}
        return {**data, "val": None} if args.val else data

    def train_one_epoch(
        model, data, loss, epoch, optimizer, scaler, scheduler, dist_model, args, tb_writer=None
    ):
        for images, _texts in data["train"].dataloader:
            loss(image_features=images, output_dict=True)
            with torch.no_grad():
                model.weight += 1

    def latest(args):
        if args.save_most_recent:
            path = os.path.join(args.checkpoint_path, "epoch_latest.pt")
            return path if os.path.exists(path) else None
        found = glob.glob(args.checkpoint_path + "**/*.pt", recursive=True)
        numbers = {path: [int(n) for n in re.findall(r"\d+", path)] for path in found}
        return max(found, key=numbers.get, default=None)

    def main(argv):
        args = program.parse_args(argv)
        args.checkpoint_path = os.path.join(args.logs, "checkpoints")
        args.save_logs = bool(args.logs) and args.logs != "none"
        if args.save_logs:
            os.makedirs(args.checkpoint_path, exist_ok=True)
        if args.resume == "latest":
            args.resume = latest(args)
        model, start = nn.Linear(3, 1, bias=False), 0
        nn.init.zeros_(model.weight)
        if args.resume:
            checkpoint = torch.load(args.resume, weights_only=True)
            start = checkpoint["epoch"]
            model.load_state_dict(checkpoint["state_dict"])
        data = program.get_data(args, (None, None), epoch=start, tokenizer=None)
        loss = program.create_loss(args)
        program.args = args
        for epoch in range(start, args.epochs):
            program.train_one_epoch(model, data, loss, epoch, None, None, None, None, args)
            completed = epoch + 1
            if "val" in data:
                program.evaluate(model, data, completed, args)
            if not args.save_logs:
                continue
            content = {"epoch": completed, "state_dict": model.state_dict()}
            folder = args.checkpoint_path
            frequent = args.save_frequency > 0 and completed % args.save_frequency == 0
            if frequent or completed == args.epochs:
                torch.save(content, os.path.join(folder, f"epoch_{completed}.pt"))
            if args.delete_previous_checkpoint:
                previous = os.path.join(folder, f"epoch_{completed - 1}.pt")
                if os.path.exists(previous):
                    os.remove(previous)
            if args.save_most_recent:
                torch.save(content, os.path.join(folder, "tmp.pt"))
                os.replace(os.path.join(folder, "tmp.pt"), os.path.join(folder, "epoch_latest.pt"))

    return filled(program, parse_args, get_data, train_one_epoch, main)


@contextlib.contextmanager
def registered(callback):
    """Have a callback in every run of the block."""
    try:
        yield register(callback)
    finally:
        if callback in list(default_registry):
            default_registry.unregister(callback)


def recorder(journal):
    def note(event):
        return lambda self, state: journal.append((event, state.loss_call))

    return type("Recorder", (Callback,), {f"on_{event.value}": note(event) for event in Event})()


def events_of(epochs):
    batch = [Event.BATCH_START, Event.LOSS_START, Event.LOSS_END, Event.BATCH_END]
    epoch = [Event.EPOCH_START, *batch * 4, Event.EPOCH_END, Event.EVAL_START, Event.EVAL_END]
    before = [Event.ARGS_PARSED, Event.DATA_READY, Event.LOSS_READY]
    return [*before, *epoch * epochs, Event.RUN_END]
