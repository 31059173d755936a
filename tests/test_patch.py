"""The patch on a stub of open_clip's training program: hooks, undo, refusals."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from stub_open_clip import events_of, recorder
from torch.nn.parallel import DistributedDataParallel

from fairclip_losses import train
from fairclip_losses.integrations.events import Callback, Event
from fairclip_losses.integrations.open_clip import HOOKS, PROGRAM, patch, run_training, unpatch


def test_patch_is_idempotent_undone_and_the_inner_one_leaves_the_outer_in_force(program):
    before = dict(vars(program))
    block = patch()
    unpatch()
    for _ in range(2):  # a block may be entered again
        with block:
            assert all(vars(program)[name].__wrapped__ is before[name] for name in HOOKS)
            wrapper = program.get_data
            with patch():
                assert program.get_data is wrapper
            assert program.get_data is wrapper
        assert vars(program) == before
    patch()
    program.evaluate = before["evaluate"]  # a half patched program is completed
    patch()
    with patch():
        pass
    assert {name for name in HOOKS if vars(program)[name] is not before[name]} == set(HOOKS)
    unpatch()
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


KNOWN = "known to work: open_clip_torch 2.26.1"


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        (
            "train_one_epoch",
            lambda task, loader, epoch, args: None,
            r"train_one_epoch\(task, loader, epoch, args\) does not take model, data, optimizer, "
            f"scaler, tb_writer; {KNOWN} to 3.3.0",
        ),
        ("train_one_epoch", 3, f"has no train_one_epoch; {KNOWN}"),
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


def test_flags_and_help_need_nothing_of_the_training_program(monkeypatch, capsys):
    pytest.importorskip("open_clip_train.params")
    monkeypatch.setitem(sys.modules, PROGRAM, None)
    for argv, message in (
        (["--epohcs", "3"], "unrecognized arguments: --epohcs 3"),
        (["--fair-wieght=3"], "(did you mean --fair-weight?)"),
        (["--epochs", "x"], "argument --epochs: invalid int value: 'x'"),
        (["--fair-weight", "1"], "--fair-weight has no effect without --fair-loss"),
    ):
        assert train.main(argv) == 2
        assert message in capsys.readouterr().err
    for flags in (["--help"], ["--fair-loss", "-h"]):
        with pytest.raises(SystemExit, match=r"^0$"):
            train.main(flags)
        shown = capsys.readouterr().out
        assert "--fair-attributes NAME" in shown and "--train-data TRAIN_DATA" in shown
        assert "pip install" not in shown
    # Without the extra our flags are shown, and what to install for the rest.
    for name in ("webdataset", "open_clip_train.params"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r"^0$"):
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert "--fair-attributes NAME" in shown and "--train-data" not in shown
    assert "pip install 'fairclip_losses[train]'" in shown
    assert train.main([]) == 1
    assert "pip install 'fairclip_losses[train]'" in capsys.readouterr().err


def test_what_is_imported_before_it_is_needed():
    """In a process of its own: here all of it is loaded."""
    code = (
        "import sys, fairclip_losses; from fairclip_losses import train, evaluate\n"
        "for main in (train.main, evaluate.main):\n"
        "    try: main(['--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = 'open_clip timm webdataset pandas torchvision matplotlib scipy.linalg'.split()\n"
        "sys.exit(', '.join(name for name in heavy if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_main_taken_before_the_patch_is_patched_too(program, registered):
    journal = []
    registered(recorder(journal))
    main = program.main  # from open_clip_train.main import main
    with patch():
        main(["--epochs", "2"])
    assert [event for event, _ in journal] == events_of(2)


def test_a_program_imported_after_and_reloaded_is_patched(monkeypatch, tmp_path):
    text = "from stub_open_clip import make_program\nvars().update(vars(make_program()))\n"
    (tmp_path / "open_clip_train").mkdir()
    (tmp_path / "open_clip_train" / "__init__.py").touch()
    (tmp_path / "open_clip_train" / "main.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("open_clip_train", PROGRAM):
        monkeypatch.setitem(sys.modules, name, None)  # to be put back as it was
        del sys.modules[name]

    def count(program):
        return sum(hasattr(getattr(program, name), "__wrapped__") for name in HOOKS)

    with patch() as patched:
        program = patched.program
        assert program is importlib.import_module(PROGRAM) and count(program) == len(HOOKS)
        importlib.reload(program)
        assert count(program) == 0
        with patch():
            assert count(program) == len(HOOKS)
    assert count(program) == 0


def test_a_run_that_lost_its_patch_stops_with_the_reason(program, registered):
    registered(Callback()).on_eval_end = lambda state: unpatch()
    patch()
    with pytest.raises(RuntimeError, match=r"no longer hooked: unpatch\(\) was called"):
        program.main(["--epochs", "2"])


def test_a_model_on_the_cpu_is_wrapped_in_runs_with_our_flags_alone(program, registered, tmp_path):
    """open_clip names the CPU to DistributedDataParallel, which refuses it."""
    wrapped = []

    def evaluate(model, data, epoch, args, tb_writer=None):
        try:
            model = DistributedDataParallel(torch.nn.Linear(1, 1), [torch.device("cpu")])
            wrapped.append(bool(model(torch.ones(1, 1)).requires_grad))
        except ValueError:
            wrapped.append(False)

    program.evaluate = evaluate
    own = DistributedDataParallel.__init__
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert run_training([]) == 0
        registered(Callback())
        assert run_training([]) == 0
    finally:
        dist.destroy_process_group()
    assert wrapped == [False, True] and DistributedDataParallel.__init__ is own
