"""The patch on a stub host: hooks, events, undo - without open_clip's training program."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import threading
import time
import types

import pytest
from stub_host import Loader, make_host

from fairclip_losses import train
from fairclip_losses.errors import CallbackError, UsageError
from fairclip_losses.integrations import events
from fairclip_losses.integrations.events import Callback, Event
from fairclip_losses.integrations.open_clip import HOOKS, HOST, patch, run_training, unpatch


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


def hooked(host):
    return {name for name in HOOKS if hasattr(getattr(host, name), "__fairclip_original__")}


def test_every_hook_is_replaced_and_put_back(host):
    everything = dict(vars(host))
    originals = {name: getattr(host, name) for name in HOOKS}
    with patch():
        for name in HOOKS:
            wrapper = getattr(host, name)
            assert wrapper is not originals[name]
            assert wrapper.__wrapped__ is originals[name]
    assert vars(host).keys() == everything.keys()
    assert all(vars(host)[name] is value for name, value in everything.items())


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


def test_a_bare_patch_stays_until_it_is_taken_back(host):
    before = dict(vars(host))
    patch()
    patch()
    with patch():
        pass
    assert hooked(host) == set(HOOKS)
    unpatch()
    unpatch()
    assert vars(host) == before


def test_a_block_may_be_entered_again(host):
    before = dict(vars(host))
    block = patch()
    for _ in range(2):
        with block, block:
            assert hooked(host) == set(HOOKS)
        assert vars(host) == before


def test_blocks_may_end_in_any_order(host):
    before = dict(vars(host))
    first, second = patch(), patch()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    unpatch()  # takes back bare calls, not a block still open
    assert hooked(host) == set(HOOKS)
    second.__exit__(None, None, None)
    assert vars(host) == before


def test_patch_is_undone_when_the_run_fails(host):
    original = host.train_one_epoch

    def broken(*args, **kwargs):
        raise RuntimeError("boom")

    host.create_loss = broken
    with pytest.raises(RuntimeError, match="boom"):
        run_training([])
    assert host.train_one_epoch is original


def test_a_half_patched_host_is_completed(host):
    before = dict(vars(host))
    patch()
    host.evaluate = host.evaluate.__wrapped__
    with patch():
        assert hooked(host) == set(HOOKS)
    unpatch()
    assert vars(host) == before


def test_what_others_put_over_the_patch_is_left_and_events_come_once(host, registered, caplog):
    journal = []
    registered(recorder(journal))
    block = patch().__enter__()
    ours = host.evaluate
    calls = []

    @functools.wraps(ours)
    def theirs(*args, **kwargs):
        calls.append(args)
        return ours(*args, **kwargs)

    host.evaluate = theirs
    with patch():
        host.main([])
    assert [event for event, _ in journal].count(Event.EVAL_END) == len(calls) == 1
    block.__exit__(None, None, None)
    assert host.evaluate is theirs and not calls[1:]
    host.main([])  # what is left of the patch lets the call through
    assert len(calls) == 2 and [event for event, _ in journal].count(Event.EVAL_END) == 1
    with patch():
        host.main([])
    assert len(calls) == 3 and [event for event, _ in journal].count(Event.EVAL_END) == 2
    assert host.evaluate is theirs
    host.evaluate = ours  # as they found it
    before = {name: getattr(host, name) for name in HOOKS if name != "evaluate"}
    with patch():
        host.main([])
    assert [event for event, _ in journal].count(Event.EVAL_END) == 3
    assert host.evaluate is ours.__wrapped__
    assert all(getattr(host, name) is value for name, value in before.items())


def test_a_replacement_made_under_the_patch_is_reported_at_its_end(host, caplog):
    with patch():
        host.evaluate = print
    assert host.evaluate is print
    assert "open_clip_train.main.evaluate was replaced after the patch" in caplog.text


def test_a_replacement_that_somebody_kept_lets_calls_through(host, registered):
    journal = []
    registered(recorder(journal))
    with patch():
        kept = host.parse_args
    assert type(kept([])) is argparse.Namespace and journal == []


def test_a_host_without_a_hook_point_is_refused_by_name(host):
    del host.train_one_epoch
    before = dict(vars(host))
    with pytest.raises(ImportError, match=r"open_clip_train.main has no train_one_epoch.*2\.26\.1"):
        patch()
    host.train_one_epoch = 3
    with pytest.raises(ImportError, match=r"open_clip_train.main has no train_one_epoch"):
        patch()
    del host.train_one_epoch
    assert vars(host) == before


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        (
            "train_one_epoch",
            lambda task, loader, epoch, args: None,
            r"train_one_epoch\(task, loader, epoch, args\) does not take model, data, optimizer, "
            "scaler, tb_writer; known to work: open_clip_torch 2.26.1 to 3.3.0",
        ),
        ("get_data", lambda args, *epoch, **kwargs: None, "not take preprocess_fns, epoch, tokeni"),
        ("create_loss", lambda: None, r"create_loss\(\) does not take args"),
        ("create_loss", lambda *args: None, r"create_loss\(\*args\) does not take args"),
        ("parse_args", lambda *, argv: None, "parse_args.* does not take one argument by position"),
        ("main", lambda: None, r"main\(\) does not take one argument by position"),
    ],
)
def test_a_host_with_other_parameters_is_refused_by_name(host, name, function, message):
    setattr(host, name, function)
    before = dict(vars(host))
    with pytest.raises(ImportError, match=message) as caught:
        patch()
    assert "\n" not in str(caught.value) and f"{HOST}." in str(caught.value)
    assert vars(host) == before


def test_functions_that_somebody_has_wrapped_opaquely_are_hooked(host, registered):
    journal = []
    registered(recorder(journal))

    def opaque(inner):
        return lambda *args, **kwargs: inner(*args, **kwargs)

    for name in HOOKS:
        setattr(host, name, opaque(getattr(host, name)))
    assert run_training([]) == 0
    assert [event for event, _ in journal] == [event for event, _ in events_of(1)]


def test_what_the_host_passes_besides_reaches_its_functions(host, registered):
    journal, seen = [], []
    registered(recorder(journal))

    def evaluate(args, epoch, *more, model, tb_writer=None, **others):
        seen.append((epoch, more, model, others))
        return {}

    def main(argv):
        host.evaluate(host.parse_args(argv), 3, "more", model="model", other=1)

    host.evaluate, host.main = evaluate, main
    assert run_training([]) == 0
    assert seen == [(3, ("more",), "model", {"other": 1})]
    assert [event for event, _ in journal][-2] is Event.EVAL_END


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


def test_a_failed_host_has_no_end(host, registered):
    journal = []
    registered(recorder(journal))
    host.status = -1
    with patch():
        host.main([])
    assert Event.RUN_END not in [event for event, _ in journal]


@pytest.mark.parametrize("taken", [False, True], ids=["", "taken-before"])
def test_the_order_of_imports_makes_no_difference(host, registered, taken):
    journal = []
    registered(recorder(journal))
    main = host.main  # from open_clip_train.main import main
    with patch():
        (main if taken else host.main)(["--epochs", "2"])
    assert [event for event, _ in journal].count(Event.EPOCH_END) == 2
    assert [event for event, _ in journal].count(Event.RUN_END) == 1
    assert journal[-1][0] is Event.RUN_END


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


def test_a_host_imported_after_is_patched(monkeypatch, tmp_path):
    package = tmp_path / "open_clip_train"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "main.py").write_text(
        "from stub_host import make_host\nvars().update(vars(make_host()))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("open_clip_train", HOST):
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        with patch() as patched:
            assert patched.host is importlib.import_module(HOST)
            assert hooked(patched.host) == set(HOOKS)
            importlib.reload(patched.host)
            assert hooked(patched.host) == set()
            with patch():
                assert hooked(patched.host) == set(HOOKS)
        assert hooked(patched.host) == set()
    finally:
        for name in ("open_clip_train", HOST):
            sys.modules.pop(name, None)


def test_two_runs_in_one_process_do_not_share_state(host, registered):
    registered(Callback())
    run_training([])
    first = host.args.run
    run_training([])
    assert host.args.run is not first
    assert host.args.run.state is not first.state


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
                self.inner = host.args.run.state
                host.args = outer

        def on_run_end(self, state):
            journal.append((state.args.epochs, "end"))

    callback = registered(Nests())
    before = dict(vars(host))
    with patch():
        assert run_training(["--epochs", "1"]) == 0
        assert hooked(host) == set(HOOKS)
    inner = [(3, "batch", k) for _ in range(3) for k in range(4)] + [(3, "end")]
    assert journal == [(1, "batch", 0), *inner, *[(1, "batch", k) for k in (1, 2, 3)], (1, "end")]
    assert callback.inner is not host.args.run.state and callback.inner.epoch == 3
    assert {name: vars(host)[name] for name in HOOKS} == {name: before[name] for name in HOOKS}


class Journal(Callback):
    """Made anew for each run: notes what it hears and in which thread."""

    made: list[Journal] = []  # noqa: RUF012  # of the whole process

    def __init__(self):
        self.heard, self.threads = [], set()
        self.made.append(self)


for _event in Event:

    def _hear(self, state, event=_event):
        self.heard.append((event, state.args.epochs))
        self.threads.add(threading.get_ident())
        time.sleep(0)  # let the others in

    setattr(Journal, f"on_{_event.value}", _hear)


def events_of(epochs):
    batch = [Event.BATCH_START, Event.LOSS_START, Event.LOSS_END, Event.BATCH_END]
    epoch = [Event.EPOCH_START, *batch * 4, Event.EPOCH_END, Event.EVAL_START, Event.EVAL_END]
    before = [Event.ARGS_PARSED, Event.DATA_READY, Event.LOSS_READY]
    return [(event, epochs) for event in [*before, *epoch * epochs, Event.RUN_END]]


def test_runs_in_several_threads_do_not_mix(host):
    before = dict(vars(host))
    failures, plain, done = [], [], threading.Event()
    Journal.made.clear()

    def guarded(function):
        def run():
            try:
                function()
            except BaseException as error:
                failures.append(error)

        return threading.Thread(target=run)

    def hooked_runs():
        for epochs in range(1, 6):
            assert (
                run_training(["--epochs", str(epochs), f"--fair-callback={__name__}:Journal"]) == 0
            )

    def plain_runs():
        parse = host.parse_args
        for _ in range(5):
            with patch():
                host.main(["--epochs", "2"])
                plain.append(type(host.parse_args([])))
        assert parse is not None

    def meddler():
        while not done.is_set():
            patch()
            unpatch()
            with patch():
                unpatch()

    workers = [guarded(hooked_runs) for _ in range(4)] + [guarded(plain_runs) for _ in range(2)]
    meddling = guarded(meddler)
    meddling.start()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    done.set()
    meddling.join()
    assert failures == []
    assert {vars(host)[name] for name in HOOKS} == {before[name] for name in HOOKS}
    assert plain == [argparse.Namespace] * 10
    assert len(Journal.made) == 20
    for journal in Journal.made:
        assert journal.heard == events_of(journal.heard[0][1])
        assert len(journal.threads) == 1


def test_unpatch_during_a_run_waits_for_its_end(host, registered):
    class Unpatches(Callback):
        def on_batch_start(self, state):
            unpatch()

    journal = []
    registered(Unpatches())
    registered(recorder(journal))
    before = dict(vars(host))
    patch()
    host.main(["--epochs", "2"])
    assert [event for event, _ in journal] == [event for event, _ in events_of(2)]
    assert all(vars(host)[name] is before[name] for name in HOOKS)


def test_a_run_that_lost_its_patch_stops_with_the_reason(host, registered):
    class Unpatches(Callback):
        def on_eval_end(self, state):
            unpatch()

    registered(Unpatches())
    main = host.main
    patch()
    with pytest.raises(RuntimeError, match=r"no longer hooked: unpatch\(\) was called"):
        main(["--epochs", "2"])


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
