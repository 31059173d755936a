"""The patch on a stub host: hooks, events, undo - without open_clip's training program."""

from __future__ import annotations

import argparse
import sys
import types

import pytest
import torch

from fairclip_losses.errors import CallbackError
from fairclip_losses.integrations import events
from fairclip_losses.integrations.events import Callback, Event
from fairclip_losses.integrations.open_clip import HOOKS, HOST, patch, run_training, unpatch


class Loader:
    """Four batches of a pair, with the attributes that the host's loop reads."""

    num_batches = 4
    num_samples = 8

    def __iter__(self):
        return iter([(torch.full((2,), float(k)), torch.zeros(2)) for k in range(4)])

    def __len__(self):
        return 4


def make_host():
    """A module with the five hook points and a main() that uses them as open_clip's does."""
    host = types.ModuleType(HOST)

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
                    host.seen.append(loss(image_features=images, output_dict=True))

    def evaluate(model, data, epoch, args, tb_writer=None, tokenizer=None):
        return {"epoch": epoch}

    def main(argv):
        args = host.parse_args(argv)
        data = host.get_data(args, (None, None), epoch=0, tokenizer=None)
        loss = host.create_loss(args)
        host.args = args
        for epoch in range(args.epochs):
            host.train_one_epoch(None, data, loss, epoch, None, None, None, None, args)
            host.evaluate(None, data, epoch + 1, args)
        return host.status

    for function in (parse_args, get_data, create_loss, train_one_epoch, evaluate, main):
        setattr(host, function.__name__, function)
    host.seen, host.status = [], None
    return host


@pytest.fixture
def host(monkeypatch):
    module = make_host()
    monkeypatch.setitem(sys.modules, HOST, module)
    return module


@pytest.fixture
def registered():
    """Registers callbacks for every run of a test, and takes them back."""
    added = []

    def add(callback):
        added.append(events.register(callback))
        return callback

    yield add
    for callback in added:
        events.default_registry.unregister(callback)


def recorder(journal):
    class Recorder(Callback):
        pass

    for event in Event:
        setattr(
            Recorder,
            f"on_{event.value}",
            lambda self, state, event=event: journal.append((event, state.loss_call)),
        )
    return Recorder()


def test_every_hook_is_replaced_and_put_back(host):
    originals = {name: getattr(host, name) for name in HOOKS}
    with patch():
        for name in HOOKS:
            wrapper = getattr(host, name)
            assert wrapper is not originals[name]
            assert wrapper.__wrapped__ is originals[name]
    assert {name: getattr(host, name) for name in HOOKS} == originals


def test_patch_is_idempotent_and_the_inner_one_leaves_the_outer_in_force(host):
    original = host.get_data
    with patch():
        wrapper = host.get_data
        with patch():
            assert host.get_data is wrapper
        assert host.get_data is wrapper
    assert host.get_data is original
    unpatch()
    assert host.get_data is original


def test_patch_is_undone_when_the_run_fails(host):
    original = host.train_one_epoch

    def broken(*args, **kwargs):
        raise RuntimeError("boom")

    host.create_loss = broken
    with pytest.raises(RuntimeError, match="boom"):
        run_training([])
    assert host.train_one_epoch is original


def test_a_half_patched_host_is_completed(host):
    patch()
    host.evaluate = host.evaluate.__wrapped__
    with patch():
        assert hasattr(host.evaluate, "__fairclip_original__")
    unpatch()
    assert not any(hasattr(getattr(host, name), "__fairclip_original__") for name in HOOKS)


def test_a_host_without_a_hook_point_is_refused_by_name(host):
    del host.train_one_epoch
    with pytest.raises(ImportError, match=r"open_clip_train.main has no train_one_epoch.*2\.26\.1"):
        patch()


def test_a_missing_host_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, HOST, None)
    with pytest.raises(ImportError, match=r"cannot import open_clip_train.main.*\[train\]"):
        patch()


def test_without_flags_and_callbacks_the_host_gets_its_own_objects(host):
    assert run_training(["--epochs", "2"]) == 0
    assert type(host.args) is argparse.Namespace
    assert vars(host.args) == {"epochs": 2, "accum_freq": 1}
    assert [float(out["contrastive_loss"]) for out in host.seen] == [0.0, 2.0, 4.0, 6.0] * 2


def test_events_come_in_the_documented_order(host, registered):
    journal = []
    registered(recorder(journal))
    assert run_training([]) == 0
    batch = [Event.BATCH_START, Event.LOSS_START, Event.LOSS_END, Event.BATCH_END]
    assert [event for event, _ in journal] == [
        Event.ARGS_PARSED,
        Event.DATA_READY,
        Event.LOSS_READY,
        Event.EPOCH_START,
        *batch * 4,
        Event.EPOCH_END,
        Event.EVAL_START,
        Event.EVAL_END,
        Event.RUN_END,
    ]


def test_loss_calls_are_counted_within_an_accumulated_step(host, registered):
    journal = []
    registered(recorder(journal))
    run_training(["--accum-freq", "2"])
    assert [call for event, call in journal if event is Event.LOSS_START] == [0, 1, 0, 1]


def test_vars_of_the_arguments_hide_the_run(host, registered):
    registered(Callback())
    run_training([])
    assert vars(host.args) == {"epochs": 1, "accum_freq": 1}
    assert host.args.run.state.args is host.args


def test_a_callback_may_change_batch_loss_inputs_and_loss(host, registered):
    class Change(Callback):
        def on_batch_start(self, state):
            state.batch = (state.batch[0] + 1, state.batch[1])

        def on_loss_ready(self, state):
            inner = state.loss
            state.loss = lambda factor, **inputs: {
                name: factor * value for name, value in inner(**inputs).items()
            }

        def on_loss_start(self, state):
            state.loss_inputs["factor"] = 10.0

    registered(Change())
    run_training([])
    assert [float(out["contrastive_loss"]) for out in host.seen] == [20.0, 40.0, 60.0, 80.0]


def test_a_failing_callback_stops_the_run_with_its_name(host, registered):
    class Faulty(Callback):
        def on_epoch_end(self, state):
            raise KeyError("gone")

    registered(Faulty())
    with pytest.raises(CallbackError, match="callback Faulty failed at epoch_end: KeyError"):
        run_training([])


def test_the_loader_keeps_its_attributes(host, registered):
    registered(Callback())
    run_training([])
    loader = host.args.run.state.data["train"].dataloader
    assert (len(loader), loader.num_batches, loader.num_samples) == (4, 4, 8)


def test_a_failed_host_is_a_failed_command(host):
    host.status = -1
    assert run_training([]) == 1


def test_two_runs_in_one_process_do_not_share_state(host, registered):
    registered(Callback())
    run_training([])
    first = host.args.run
    run_training([])
    assert host.args.run is not first
    assert host.args.run.state is not first.state
