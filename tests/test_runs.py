"""Runs of a stub host under the patch: events, order, failures, the command line."""

from __future__ import annotations

import argparse
import gc
import sys
import threading
import types
import weakref

import pytest
from stub_host import Journal, Loader, recorder

from fairclip_losses import train
from fairclip_losses.errors import CallbackError, UsageError
from fairclip_losses.integrations.events import Callback, Event
from fairclip_losses.integrations.open_clip import HOOKS, patch, run_training


class Keeps(Callback):
    """Keeps the state of each run beyond its end."""

    def __init__(self):
        self.states = []

    def on_run_end(self, state):
        self.states.append(state)


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
    states = registered(Keeps()).states
    run_training([])
    assert vars(host.args) == {"epochs": 1, "accum_freq": 1}
    assert states[0].args is host.args


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
    states = registered(Keeps()).states
    run_training([])
    loader = states[0].data["train"].dataloader
    assert (len(loader), loader.num_batches, loader.num_samples) == (4, 4, 8)


def test_a_failed_host_is_a_failed_command(host):
    host.status = -1
    assert run_training([]) == 1


def test_a_failed_host_has_no_end(host, registered):
    journal = []
    registered(recorder(journal))
    host.status = -1
    with patch():
        host.main([])
    assert Event.RUN_END not in [event for event, _ in journal]


def test_a_main_taken_before_that_fails_has_no_end(host, registered):
    journal = []
    registered(recorder(journal))
    main = host.main

    def fails(model, data, epoch, args, tb_writer=None, tokenizer=None):
        raise RuntimeError("boom")

    host.evaluate = fails
    with pytest.raises(RuntimeError, match="boom"), patch():
        main([])

    def gives_up(argv):
        host.parse_args(argv)
        return -1

    with patch():
        gives_up([])
    assert Event.ARGS_PARSED in [event for event, _ in journal]
    assert Event.RUN_END not in [event for event, _ in journal]


def test_two_runs_in_one_process_do_not_share_state(host, registered):
    states = registered(Keeps()).states
    run_training([])
    first = host.args.run
    run_training([])
    assert host.args.run is not first
    assert states[0] is not states[1]


class Watches(Callback):
    """Keeps no more than weak references to what a run works on."""

    def __init__(self, fails=False):
        self.seen, self.fails = {}, fails

    def on_batch_end(self, state):
        loader = state.data["train"].dataloader
        seen = {"state": state, "loader": loader, "batch": state.batch[0], "args": state.args}
        self.seen = {name: weakref.ref(value) for name, value in seen.items()}
        if self.fails:
            raise ValueError("no more of this")

    def alive(self):
        assert self.seen
        return [name for name, reference in self.seen.items() if reference() is not None]


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("taken_before", [False, True])
def test_a_run_that_has_ended_holds_nothing(host, registered, no_collector, taken_before):
    watches = registered(Watches())
    host.main = main = forgetful(host)
    with patch():
        assert (main if taken_before else host.main)([]) is None
        assert taken_before or not watches.alive()
    assert not watches.alive()


def test_a_run_that_has_failed_holds_nothing(host, registered, no_collector, capsys):
    watches = registered(Watches(fails=True))
    host.main = forgetful(host)
    assert train.main([]) == 1
    assert "callback Watches failed at batch_end" in capsys.readouterr().err
    assert not watches.alive()


def forgetful(host):
    """The stub's main(), which leaves its arguments for the tests to see, without them."""
    main = host.main

    def forgets(argv):
        try:
            return main(argv)
        finally:
            del host.args
            host.seen.clear()

    return forgets


def test_a_run_inside_a_callback_of_another(host, registered):
    journal = []

    class Nests(Callback):
        inner = None

        def on_batch_start(self, state):
            journal.append((state.args.epochs, "batch", state.batch_index))
            if self.inner is None:
                self.inner = "under way"
                outer = host.args
                assert run_training(["--epochs", "3"]) == 0
                self.inner = ends.states[0]
                host.args = outer

        def on_run_end(self, state):
            journal.append((state.args.epochs, "end"))

    callback, ends = registered(Nests()), registered(Keeps())
    before = dict(vars(host))
    with patch():
        assert run_training(["--epochs", "1"]) == 0
        assert all(hasattr(getattr(host, name), "__fairclip_original__") for name in HOOKS)
    inner = [(3, "batch", k) for _ in range(3) for k in range(4)] + [(3, "end")]
    assert journal == [(1, "batch", 0), *inner, *[(1, "batch", k) for k in (1, 2, 3)], (1, "end")]
    assert callback.inner is not ends.states[1] and callback.inner.epoch == 3
    assert {name: vars(host)[name] for name in HOOKS} == {name: before[name] for name in HOOKS}


def test_a_callbacks_own_pass_over_the_loader_fires_nothing(host, registered):
    passes = []

    class Peeks(Callback):
        def on_loss_ready(self, state):
            passes.append(list(state.data["train"].dataloader))

        on_epoch_start = on_loss_ready

        def on_batch_end(self, state):
            passes.append(list(state.data["train"].dataloader))

    journal = []
    registered(Peeks())
    registered(recorder(journal))
    run_training([])
    assert [len(batches) for batches in passes] == [len(Loader())] * 6
    assert [event for event, _ in journal].count(Event.BATCH_START) == 4


def test_what_the_hosts_parser_says_is_not_lost(host, capsys):
    parse = host.parse_args

    def warns(argv):
        print("deprecated", file=sys.stderr)
        return parse(argv)

    host.parse_args = warns
    run_training([])
    assert capsys.readouterr().err == "deprecated\n"


def test_what_another_thread_says_meanwhile_is_not_swallowed(host, capsys):
    def refuses(argv):
        other = threading.Thread(
            target=print, args=("of another thread",), kwargs={"file": sys.stderr}
        )
        other.start()
        other.join()
        print("usage: ...\nmain: error: not like this", file=sys.stderr)
        sys.exit(2)

    host.parse_args = refuses
    with pytest.raises(UsageError, match=r"^not like this$"):
        run_training([])
    assert capsys.readouterr().err == "of another thread\n"


def test_refusals_in_several_threads_keep_stderr(host, capsys):
    before, messages = sys.stderr, []
    start = threading.Barrier(4)

    def refused(number):
        start.wait()
        for _ in range(20):
            try:
                run_training([f"--epochs=x{number}"])
            except UsageError as error:
                messages.append((number, str(error)))

    threads = [threading.Thread(target=refused, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    start.wait()
    for _ in range(200):
        print("a line of another thread", file=sys.stderr)
    for thread in threads:
        thread.join()
    assert sys.stderr is before
    assert len(messages) == 60
    assert all(
        message == f"argument --epochs: invalid int value: 'x{k}'" for k, message in messages
    )
    assert capsys.readouterr().err == "a line of another thread\n" * 200


class Exits(Callback):
    def __init__(self):
        sys.exit(3)


class ExitsLater(Callback):
    def on_loss_end(self, state):
        sys.exit()


@pytest.mark.parametrize(
    ("name", "status", "line"),
    [
        ("Exits", 2, ":Exits cannot be made without arguments: SystemExit: 3"),
        ("ExitsLater", 1, "callback ExitsLater failed at loss_end: SystemExit: "),
        ("missing", 2, ":missing cannot be imported: AttributeError"),
    ],
)
def test_a_callback_that_exits_ends_the_command_with_its_name(host, capsys, name, status, line):
    before = dict(vars(host))
    assert train.main([f"--fair-callback={__name__}:{name}"]) == status
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("fairclip_losses.train: error: ") and line.strip() in last
    assert all(vars(host)[name] is before[name] for name in HOOKS)


def test_a_module_that_exits_is_one_line(host, capsys, monkeypatch, tmp_path):
    (tmp_path / "a_script_of_the_tests.py").write_text("raise SystemExit('usage: ...')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert train.main(["--fair-callback=a_script_of_the_tests:Name"]) == 2
    assert "cannot be imported: SystemExit: usage: ..." in capsys.readouterr().err


def test_the_order_is_registered_then_command_line(host, registered):
    Journal.made.clear()
    order = []

    class First(Callback):
        def on_args_parsed(self, state):
            order.append(("first", len(Journal.made[0].heard)))

        def on_epoch_end(self, state):
            order.append(("first", len(Journal.made[0].heard)))

    registered(First())
    run_training([f"--fair-callback={__name__}:Journal"])
    # First before the command line's at a start, and after it at an end.
    until_end = [event for event, _ in Journal.made[0].heard].index(Event.EPOCH_END)
    assert order == [("first", 0), ("first", until_end + 1)]


def test_one_instance_twice_on_the_command_line_is_one_line(host, capsys):
    module = types.ModuleType("module_of_the_tests")
    module.ONE = Callback()
    sys.modules["module_of_the_tests"] = module
    try:
        flags = ["--fair-callback", "module_of_the_tests:ONE"]
        assert train.main([*flags, *flags]) == 2
    finally:
        del sys.modules["module_of_the_tests"]
    assert "callback Callback is registered already" in capsys.readouterr().err
