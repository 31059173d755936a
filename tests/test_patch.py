"""The patch on a stub host: hooks, events, undo - without open_clip's training program."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import threading

import pytest
from stub_host import Journal, events_of, recorder

from fairclip_losses.integrations.events import Callback, Event
from fairclip_losses.integrations.open_clip import HOOKS, HOST, patch, run_training, unpatch


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


def test_what_others_put_over_the_hooks_stays_over_them_while_runs_go_on(host):
    """Such as one that adds our own flags: it must be asked before the hook, in every run."""
    Journal.made.clear()
    patch()
    ours = host.parse_args

    @functools.wraps(ours)
    def with_a_flag(argv):
        return ours([*argv, f"--fair-callback={__name__}:Journal"])

    host.parse_args = with_a_flag
    host.main([])
    host.main([])
    assert host.parse_args is with_a_flag
    assert [bool(made.heard) for made in Journal.made] == [True, True]
    host.parse_args = ours
    unpatch()
    assert hooked(host) == set()


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
