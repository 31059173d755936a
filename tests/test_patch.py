"""The patch on a stub of open_clip's training program: hooks, undo, refusals."""

from __future__ import annotations

import functools
import importlib
import sys

import pytest
from stub_open_clip import events_of, recorder

from fairclip_losses.integrations.events import Callback, Event
from fairclip_losses.integrations.open_clip import HOOKS, PROGRAM, patch, run_training, unpatch


def hooked(program, originals):
    return {name for name in HOOKS if vars(program)[name] is not originals[name]}


def test_every_hook_is_replaced_and_put_back(program):
    before = dict(vars(program))
    with patch():
        assert all(vars(program)[name].__wrapped__ is before[name] for name in HOOKS)
    assert vars(program) == before


def test_patch_is_idempotent_and_the_inner_one_leaves_the_outer_in_force(program):
    before = dict(vars(program))
    with patch():
        wrapper = program.get_data
        with patch():
            assert program.get_data is wrapper
        assert program.get_data is wrapper
    assert vars(program) == before
    patch()
    patch()
    with patch():
        pass
    assert hooked(program, before) == set(HOOKS)
    unpatch()
    unpatch()
    assert vars(program) == before


def test_a_block_may_be_entered_again(program):
    before = dict(vars(program))
    block = patch()
    for _ in range(2):
        with block:
            assert hooked(program, before) == set(HOOKS)
        assert vars(program) == before


def test_patch_is_undone_when_the_run_fails(program):
    def broken(args):
        raise RuntimeError("boom")

    program.create_loss = broken
    before = dict(vars(program))
    with pytest.raises(RuntimeError, match="boom"):
        run_training([])
    assert all(vars(program)[name] is before[name] for name in HOOKS)


def test_a_half_patched_program_is_completed(program):
    before = dict(vars(program))
    patch()
    program.evaluate = program.evaluate.__wrapped__
    with patch():
        assert hooked(program, before) == set(HOOKS)
    unpatch()
    assert vars(program) == before


def test_what_others_put_over_the_patch_is_left_and_events_come_once(program, registered, caplog):
    journal, calls = [], []
    registered(recorder(journal))
    patch()
    ours = program.evaluate

    @functools.wraps(ours)
    def theirs(*args, **kwargs):
        calls.append(args)
        return ours(*args, **kwargs)

    program.evaluate = theirs
    with patch():
        program.main([])
    assert [event for event, _ in journal].count(Event.EVAL_END) == len(calls) == 1
    unpatch()
    assert program.evaluate is theirs
    program.evaluate = ours  # as they found it: what is left of the patch lets calls through
    program.main([])
    assert len(calls) == 1 and [event for event, _ in journal].count(Event.EVAL_END) == 1
    with patch():
        program.main([])
        program.evaluate = print
    assert [event for event, _ in journal].count(Event.EVAL_END) == 2
    assert program.evaluate is print
    assert "open_clip_train.main.evaluate was replaced after the patch" in caplog.text


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        (
            "train_one_epoch",
            lambda task, loader, epoch, args: None,
            r"train_one_epoch\(task, loader, epoch, args\) does not take model, data, optimizer, "
            "scaler, tb_writer; known to work: open_clip_torch 2.26.1 to 3.3.0",
        ),
        ("train_one_epoch", 3, "has no train_one_epoch; known to work: open_clip_torch 2.26.1"),
        ("get_data", lambda args, *epoch, **kwargs: None, "not take preprocess_fns, epoch, tokeni"),
        ("create_loss", lambda: None, r"create_loss\(\) does not take args"),
        ("create_loss", lambda *args: None, r"create_loss\(\*args\) does not take args"),
        ("parse_args", lambda *, argv: None, "parse_args.* does not take one argument by position"),
        ("main", lambda: None, r"main\(\) does not take one argument by position"),
    ],
)
def test_a_program_with_other_functions_is_refused_by_name(program, name, function, message):
    setattr(program, name, function)
    before = dict(vars(program))
    with pytest.raises(ImportError, match=message) as caught:
        patch()
    assert "\n" not in str(caught.value) and PROGRAM in str(caught.value)
    assert vars(program) == before


def test_what_the_program_passes_besides_reaches_its_functions(program, registered):
    journal, seen = [], []
    registered(recorder(journal))

    def evaluate(args, epoch, *more, model, tb_writer=None, **others):
        seen.append((epoch, more, model, others))
        return {}

    def main(argv):
        program.evaluate(program.parse_args(argv), 3, "more", model="model", other=1)

    program.evaluate, program.main = evaluate, main
    assert run_training([]) == 0
    assert seen == [(3, ("more",), "model", {"other": 1})]
    assert [event for event, _ in journal][-1] is Event.EVAL_END


def test_a_missing_program_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, PROGRAM, None)
    with pytest.raises(ImportError, match=r"cannot import open_clip_train.main.*\[train\]"):
        patch()


@pytest.mark.parametrize("taken", [False, True], ids=["", "taken-before"])
def test_the_order_of_imports_makes_no_difference(program, registered, taken):
    journal = []
    registered(recorder(journal))
    main = program.main  # from open_clip_train.main import main
    with patch():
        (main if taken else program.main)(["--epochs", "2"])
    assert [event for event, _ in journal] == events_of(2)


def test_a_program_imported_after_and_reloaded_is_patched(monkeypatch, tmp_path):
    package = tmp_path / "open_clip_train"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "main.py").write_text(
        "from stub_open_clip import make_program\nvars().update(vars(make_program()))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("open_clip_train", PROGRAM):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def count(program):
        return sum(hasattr(getattr(program, name), "__wrapped__") for name in HOOKS)

    try:
        with patch() as patched:
            program = patched.program
            assert program is importlib.import_module(PROGRAM) and count(program) == len(HOOKS)
            importlib.reload(program)
            assert count(program) == 0
            with patch():
                assert count(program) == len(HOOKS)
        assert count(program) == 0
    finally:
        for name in ("open_clip_train", PROGRAM):
            sys.modules.pop(name, None)


def test_a_run_that_lost_its_patch_stops_with_the_reason(program, registered):
    class Unpatches(Callback):
        def on_eval_end(self, state):
            unpatch()

    registered(Unpatches())
    patch()
    with pytest.raises(RuntimeError, match=r"no longer hooked: unpatch\(\) was called"):
        program.main(["--epochs", "2"])
