"""Runs of a stub of open_clip's program under the patch: events, failures, the command line."""

from __future__ import annotations

import argparse
import gc
import sys
import weakref
from typing import ClassVar

import pytest
from stub_open_clip import Loader, events_of, recorder

from fairclip_losses import train
from fairclip_losses.errors import UsageError
from fairclip_losses.integrations.events import Callback, Event
from fairclip_losses.integrations.open_clip import HOOKS, patch, run_training


def test_without_flags_and_callbacks_open_clip_gets_its_own_objects(program):
    assert run_training(["--epochs", "2"]) == 0
    assert type(program.args) is argparse.Namespace
    assert vars(program.args) == {"epochs": 2, "accum_freq": 1}
    assert [float(out["contrastive_loss"]) for out in program.seen] == [0.0, 2.0, 4.0, 6.0] * 2


def test_events_come_in_the_documented_order_and_loss_calls_are_counted_by_step(
    program, registered
):
    journal = []
    registered(recorder(journal))
    assert run_training(["--epochs", "2"]) == 0
    assert [event for event, _ in journal] == events_of(2)
    journal.clear()
    run_training(["--accum-freq", "2"])
    assert [call for event, call in journal if event is Event.LOSS_START] == [0, 1, 0, 1]


def test_runs_share_no_state_hide_themselves_and_keep_the_loaders_attributes(program, registered):
    states = []
    registered(Callback()).on_run_end = states.append
    for _ in range(2):
        run_training([])
        assert vars(program.args) == {"epochs": 1, "accum_freq": 1}
        assert states[-1].args is program.args
    assert states[0] is not states[1]
    loader = states[0].data["train"].dataloader
    assert (len(loader), loader.num_batches, loader.num_samples) == (4, 4, 8)


def test_a_callback_may_change_batch_loss_inputs_and_loss(program, registered):
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
    assert [float(out["contrastive_loss"]) for out in program.seen] == [20.0, 40.0, 60.0, 80.0]


def test_a_run_that_open_clip_gives_up_has_no_end_and_is_a_failed_command(program, registered):
    journal = []
    registered(recorder(journal))
    program.status = -1
    assert run_training([]) == 1
    main = program.main

    def fails(model, data, epoch, args, tb_writer=None, tokenizer=None):
        raise RuntimeError("boom")

    program.evaluate = fails
    with pytest.raises(RuntimeError, match="boom"), patch():
        main([])  # taken before the patch
    with patch():
        program.parse_args([])
    assert [event for event, _ in journal].count(Event.ARGS_PARSED) == 3
    assert Event.RUN_END not in [event for event, _ in journal]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_has_ended_holds_nothing(program, registered, fails):
    seen, main = {}, program.main

    class Watches(Callback):
        """Keeps no more than weak references to what a run works on."""

        def on_batch_end(self, state):
            values = {"state": state, "batch": state.batch[0], "args": state.args}
            values["loader"] = state.data["train"].dataloader
            seen.update({name: weakref.ref(value) for name, value in values.items()})
            if fails:
                raise ValueError("no more of this")

    def forgetful(argv):
        try:
            return main(argv)
        finally:
            del program.args
            program.seen.clear()

    registered(Watches())
    program.main = forgetful
    gc.collect()
    gc.disable()
    try:
        assert train.main([]) == fails
        assert len(seen) == 4 and not [name for name, there in seen.items() if there() is not None]
    finally:
        gc.enable()


def test_a_run_inside_another_is_refused(program, registered):
    nests = registered(Callback())
    nests.on_epoch_end = lambda state: run_training([])
    with pytest.raises(UsageError, match="a run inside another one: start it in a process of its"):
        run_training([])
    assert not any(hasattr(getattr(program, name), "__wrapped__") for name in HOOKS)


def test_a_callbacks_own_pass_over_the_loader_fires_nothing(program, registered):
    passes, journal, peeks = [], [], registered(Callback())
    for name in ("on_loss_ready", "on_epoch_start", "on_batch_end"):
        setattr(peeks, name, lambda s: passes.append(len(list(s.data["train"].dataloader))))
    registered(recorder(journal))
    run_training([])
    assert passes == [len(Loader())] * 6
    assert [event for event, _ in journal].count(Event.BATCH_START) == 4


def test_open_clips_parser_warns_as_ever_and_refuses_in_one_line(program, capsys):
    parse = program.parse_args

    def warns(argv):
        print("deprecated", file=sys.stderr)
        return parse(argv)

    program.parse_args = warns
    run_training([])
    assert capsys.readouterr().err == "deprecated\n"
    with pytest.raises(UsageError, match=r"^argument --epochs: invalid int value: 'x'$"):
        run_training(["--epochs", "x"])
    assert capsys.readouterr().err == ""


ONE = Callback()


class Exits(Callback):
    def __init__(self):
        sys.exit(3)


class Faulty(Callback):
    def on_epoch_end(self, state):
        raise KeyError("gone")


@pytest.mark.parametrize(
    ("names", "status", "line"),
    [
        (["Exits"], 2, ":Exits cannot be made without arguments: SystemExit: 3"),
        (["Faulty"], 1, "callback Faulty failed at epoch_end: KeyError: 'gone'"),
        (["missing"], 2, ":missing cannot be imported: AttributeError"),
        (["ONE", "ONE"], 2, "callback Callback is registered already"),
    ],
)
def test_a_callback_that_fails_ends_the_command_with_its_name(program, capsys, names, status, line):
    before = dict(vars(program))
    assert train.main([f"--fair-callback={__name__}:{name}" for name in names]) == status
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("fairclip_losses.train: error: ") and line.strip() in last
    assert all(vars(program)[name] is before[name] for name in HOOKS)


class Second(Callback):
    heard: ClassVar[list[str]] = []

    def on_args_parsed(self, state):
        self.heard.append(type(self).__name__)

    on_epoch_end = on_args_parsed


class First(Second):
    pass


def test_the_order_is_registered_then_command_line(program, registered):
    registered(First())
    run_training([f"--fair-callback={__name__}:Second"])
    assert Second.heard == ["First", "Second", "Second", "First"]  # reversed at an end
