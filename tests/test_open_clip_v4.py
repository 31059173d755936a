"""The hooks of open_clip 4's shape, on a stub small enough to read: the same events and loss."""

from __future__ import annotations

import argparse
import sys
import types

import pytest
import torch
from open_clip import ClipLoss
from stub_open_clip import filled, recorder
from tiny_clip import write_pairs
from torch import nn
from torch.utils.data import DataLoader

from fairclip_losses.errors import UsageError
from fairclip_losses.integrations.events import Callback, Event
from fairclip_losses.integrations.open_clip import PROGRAM, patch, run_training

COUNT, BATCH, SIZE = 24, 4, 6
HOOKS = ("main", "parse_args", "create_task", "get_data", "train_one_epoch", "evaluate")


class Task(nn.Module):
    """Model and loss in one."""

    data_keys = ("image", "text")

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.trainable_module = nn.ModuleDict({k: nn.Linear(SIZE, 4) for k in self.data_keys})
        if loss is not None:
            self.loss = loss

    def forward(self, image, text, text_valid):
        out = {"logit_scale": torch.tensor(4.0)}
        for key, x in (("image", image), ("text", text)):
            features = self.trainable_module[key](x)
            out[f"{key}_features"] = nn.functional.normalize(features, dim=-1)
        return out


def make_program(loss):
    """A module with the hook points of open_clip 4 and a main() that calls them in its order."""
    program = types.ModuleType(PROGRAM)

    def parse_args(args):
        parser = argparse.ArgumentParser()
        parser.add_argument("--epochs", type=int, default=2)
        parser.add_argument("--accum-freq", type=int, default=1)
        parser.add_argument("--train-data")
        constants = {
            "dataset_type": "csv", "csv_separator": "\t", "csv_img_key": "filepath", "rank": 0,
            "world_size": 1, "csv_caption_key": "title", "device": "cpu", "batch_size": BATCH,
            "val_data": None, "model": "towers", "save_logs": False, "logs": "none", "resume": None,
            "log_every_n_steps": 1, "save_frequency": 0, "save_most_recent": False,
        }  # fmt: skip
        return parser.parse_args(args, argparse.Namespace(**constants))

    def create_task(args, model, dist_model=None, naflex_data_config=None):
        return Task(loss)

    def get_data(args, preprocess_fns, epoch=0, tokenizer=None, naflex_data_config=None):
        draw = torch.Generator().manual_seed(1)
        image, text = torch.randn(2, COUNT, SIZE, generator=draw)
        pairs = [{"image": image[k], "text": text[k], "text_valid": k} for k in range(COUNT)]
        loader = DataLoader(pairs, BATCH, shuffle=True, generator=draw)
        loader.num_batches = len(loader)
        return {"train": types.SimpleNamespace(dataloader=loader), "val": None}

    def train_one_epoch(state, data, args, tb_writer=None):
        held, task = [], state.task
        for batch in data["train"].dataloader:
            program.batches.append(set(batch))
            held.append(task(**batch))
            if len(held) == args.accum_freq and hasattr(task, "loss"):
                for _ in held:
                    inputs = {k: torch.cat([h[k] for h in held]) for k in held[0] if k[-1] == "s"}
                    losses = task.loss(**inputs, logit_scale=torch.tensor(4.0), output_dict=True)
                    sum(losses.values()).backward(retain_graph=True)
                state.optimizer.step()
                state.optimizer.zero_grad()
                held = []

    def evaluate(task, data, epoch, args, tb_writer=None, tokenizer=None):
        return {"epoch": epoch}

    def main(args):
        args = program.parse_args(args)
        program.task = task = program.create_task(args, model=None, dist_model=None)
        data = program.get_data(args, (None, None), epoch=0, tokenizer=None)
        state = types.SimpleNamespace(task=task, scaler=None, epoch=0)
        state.optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
        for state.epoch in range(args.epochs):
            program.train_one_epoch(state, data, args, tb_writer=None)
            program.evaluate(task, data, state.epoch + 1, args, tb_writer=None, tokenizer=None)

    program.batches = []
    return filled(program, parse_args, create_task, get_data, train_one_epoch, evaluate, main)


@pytest.fixture
def start(monkeypatch, tmp_path):
    def run(*argv, loss=ClipLoss, fair=False):
        program = make_program(loss())
        monkeypatch.setitem(sys.modules, PROGRAM, program)
        table = str(write_pairs(tmp_path, COUNT, "train"))
        flags = ["--train-data", table, "--fair-loss", "--fair-attributes", "sex"] * fair
        assert run_training([*flags, *argv]) == 0
        assert program.batches == [{"image", "text", "text_valid"}] * 12
        return program.task

    return run


def test_the_hooks_are_chosen_by_what_the_program_has(monkeypatch):
    program = make_program(ClipLoss())
    monkeypatch.setitem(sys.modules, PROGRAM, program)
    before = dict(vars(program))
    with patch():
        assert all(vars(program)[name] is not before[name] for name in HOOKS)
    assert vars(program) == before
    program.get_data = lambda args: {}
    with pytest.raises(ImportError, match=r"get_data\(args\) does not take prep.*4\.2\.0\.dev0"):
        patch()


def test_the_events_are_those_of_the_released_versions(start, registered):
    journal = []
    registered(recorder(journal))
    start("--accum-freq", "2")
    heard = [event for event, _ in journal]
    loss = [Event.LOSS_START, Event.LOSS_END] * 2
    step = [Event.BATCH_START, Event.BATCH_END, Event.BATCH_START, *loss, Event.BATCH_END]
    before = [Event.ARGS_PARSED, Event.DATA_READY, Event.LOSS_READY, Event.EPOCH_START]
    after = [Event.EPOCH_END, Event.EVAL_START, Event.EVAL_END]
    assert heard == [*before, *step * 3, *after, before[-1], *step * 3, *after, Event.RUN_END]
    assert [call for event, call in journal if event is Event.LOSS_START] == [0, 1] * 6


def test_a_batch_of_another_form_is_refused(start, registered):
    def leave(state):
        images, texts = state.batch
        assert images.shape == texts.shape == (BATCH, SIZE)
        state.batch = (images, texts, "one more")

    registered(Callback()).on_batch_start = leave
    with pytest.raises(ValueError, match=r"must be \(image, text\) .* got 3 values"):
        start()


@pytest.mark.parametrize("accum_freq", ["1", "2"])
def test_the_fair_loss_sees_each_pair_once_and_idle_trains_upstreams_weights(start, accum_freq):
    more = ("--accum-freq", accum_freq)
    report = start(*more, fair=True).loss.inner.miner.report()
    assert report.ids.tolist() == list(range(COUNT)) and set(report.visits) == {2}
    idle = ("--fair-weight", "0", "--fair-warmup-epochs", "9")
    upstream, ours = start(*more).state_dict(), start(*more, *idle, fair=True).state_dict()
    torch.testing.assert_close({name: ours[name] for name in upstream}, dict(upstream))


def test_a_task_without_a_loss_is_refused(start):
    with pytest.raises(UsageError, match=r"Task, of --model towers, has none"):
        start(fair=True, loss=lambda: None)
