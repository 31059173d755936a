"""The patch: fires training events inside open_clip's own training program.

``open_clip_train.main`` looks five functions up in its own namespace, and is called there by the
name of ``main``. The patch replaces these names by wrappers that call the originals and fire
`Event`s around them, and copies none of open_clip's code. A run for which nothing was asked passes
through untouched. The hooks for the shape of open_clip 4 are in `open_clip_v4`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import importlib.util
import io
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

from torch.nn.parallel import DistributedDataParallel

from ..errors import UsageError
from .events import Event, default_registry
from .flags import FairOptions, build_parser, split_flags
from .patching import Call, Hook, ModulePatch
from .run import HookedArgs, HookedLoader, HookedLoss, Run, of_a_run

PROGRAM = "open_clip_train.main"
INSTALL = "pip install 'fairclip_losses[train]'"
_NEEDED = ("open_clip_train", "pandas", "webdataset", "braceexpand")  # which the extra brings
KNOWN_VERSIONS = "open_clip_torch 2.26.1 to 3.3.0"

_mains: list[Call] = []  # calls of main() that go on
_under_way: list[Run] = []  # at most one: begun where arguments are parsed, and not ended


def _wrap_model(call: Call) -> Any:
    """Name no device for a model on the CPU, where open_clip does and torch refuses it."""
    if [str(device) for device in call["device_ids"] or ()] != ["cpu"]:
        return call.proceed()
    call.bound.arguments["device_ids"] = None
    return call.original(*call.bound.args, **call.bound.kwargs)


# In force while a run is under way.
_on_cpu = ModulePatch(
    DistributedDataParallel, (Hook("__init__", _wrap_model, ("device_ids",)),), "torch 2.5 or later"
)


def _end_run(ended_well: bool) -> None:
    """End the run under way, if there is one, and let go of what it holds."""
    while _under_way:
        _on_cpu.undo()
        run = _under_way.pop()
        try:
            if ended_well and run.state.data is not None:
                run.end()
        finally:
            run.let_go()


def _main(call: Call) -> Any:
    if _mains and _under_way:
        raise UsageError("a run inside another one: start it in a process of its own")
    status = -1  # what open_clip returns where it gives up
    _mains.append(call)
    try:
        status = call.proceed()
    finally:
        _mains.pop()
        _end_run(status is None)
    return status


def _parse_args(call: Call) -> Any:
    argv, *others = call.args
    args = parse_arguments(lambda rest: call.original(rest, *others, **call.kwargs), argv)
    if isinstance(args, HookedArgs):
        _end_run(False)  # one of a main() that was not hooked, and failed
        _under_way.append(args.run)
        _on_cpu.install()
        args.run.fire(Event.ARGS_PARSED)
    return args


def parse_arguments(parse: Callable[[list[str]], argparse.Namespace], argv: Sequence[str]) -> Any:
    """Return open_clip's own arguments where nothing was asked, `HookedArgs` otherwise."""
    options, args = _parse_both(parse, argv)
    if not (options.active or len(default_registry)):
        return args
    hooked = HookedArgs(**vars(args))
    if options.active:
        vars(hooked).update(vars(options))
    hooked.run = Run(options, hooked)
    return hooked


def _parse_both(parse: Callable[[list[str]], Any], argv: Sequence[str]) -> tuple[FairOptions, Any]:
    """Return our options and open_clip's arguments; ``--help`` shows both.

    What open_clip's parser refuses is its one line, without the pages of usage.
    """
    if any(word in ("-h", "--help") for word in argv):
        usage = "usage: python -m fairclip_losses.train [open_clip's flags] [--fair-loss ...]\n"
        print(usage, build_parser().format_help(), sep="\n")
        if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
            print(f"{', '.join(missing)} is not here, and training needs it: {INSTALL}\n")
        print("open_clip's own flags, unchanged:\n")
        parse(["--help"])
    options, rest = split_flags(argv)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parse(rest)
    except SystemExit as stop:
        if not stop.code:
            raise
        message = said.getvalue().strip().rpartition("error: ")[2]
        raise UsageError(f"{message}{_suggestion(message)}") from None
    sys.stderr.write(said.getvalue())
    return options, args


def check_flags(argv: Sequence[str]) -> None:
    """Refuse wrong flags, or show the help, before open_clip with all that it needs is imported."""
    if sys.modules.get(PROGRAM) is not None:
        return
    try:
        parse = importlib.import_module("open_clip_train.params").parse_args
    except ImportError:
        parse = _say_what_is_missing
    _parse_both(parse, argv)


def _say_what_is_missing(argv: list[str]) -> None:
    """Stand in for open_clip's parser where there is none; `patch` refuses what is no help."""
    if "--help" in argv:
        print(f"(shown once it is installed: {INSTALL})")
        raise SystemExit(0)


def _suggestion(message: str) -> str:
    """Return a hint where a flag of ours is misspelt."""
    ours = [flag for action in build_parser()._actions for flag in action.option_strings]
    for word in re.findall(r"--fair[\w-]*", message):
        if close := difflib.get_close_matches(word, ours, n=1):
            return f" (did you mean {close[0]}?)"
    return ""


@of_a_run
def _get_data(call: Call, run: Run) -> Any:
    data = call.proceed()
    run.take_data(data, call["preprocess_fns"], call["tokenizer"], call["epoch"])
    if "train" in data:
        data["train"].dataloader = HookedLoader(data["train"].dataloader, run)
    return data


@of_a_run
def _create_loss(call: Call, run: Run) -> Any:
    loss = call.proceed()
    run.state.loss = loss
    run.fire(Event.LOSS_READY)
    run.restore()
    return HookedLoss(run)


@of_a_run
def _train_one_epoch(call: Call, run: Run) -> Any:
    state = run.state
    state.model, state.optimizer, state.scaler = call["model"], call["optimizer"], call["scaler"]
    state.tb_writer, state.epoch = call["tb_writer"], call["epoch"]
    with run.epoch(call["data"]):
        return call.proceed()


@of_a_run
def _evaluate(call: Call, run: Run) -> Any:
    return run.evaluate(call.proceed, call["model"], call["epoch"], call["tb_writer"])


_COMMON_HOOKS = (Hook("main", _main), Hook("parse_args", _parse_args))
_HOOKS = (
    *_COMMON_HOOKS,
    Hook("get_data", _get_data, ("args", "preprocess_fns", "epoch", "tokenizer")),
    Hook("create_loss", _create_loss, ("args",)),
    Hook(
        "train_one_epoch",
        _train_one_epoch,
        ("model", "data", "epoch", "optimizer", "scaler", "args", "tb_writer"),
    ),
    Hook("evaluate", _evaluate, ("model", "epoch", "args", "tb_writer")),
)
HOOKS = tuple(hook.name for hook in _HOOKS)


def _patch_of(program: ModuleType) -> ModulePatch:
    """Return the hooks that fit the program's shape: told by what it has, not by its version."""
    if hasattr(program, "create_task"):
        from . import open_clip_v4 as v4

        return ModulePatch(program, (*_COMMON_HOOKS, *v4.HOOKS), v4.KNOWN_VERSIONS)
    return ModulePatch(program, _HOOKS, KNOWN_VERSIONS)


_patches: dict[ModuleType, ModulePatch] = {}


class Patch:
    """What `patch` returns: the patch in force, and a context manager that takes it back."""

    def __init__(self, hooks: ModulePatch) -> None:
        self.program = cast(ModuleType, hooks.module)
        self._hooks = hooks
        self._is_ours = hooks.install()  # False where it was in force before

    def __enter__(self) -> Patch:
        self._is_ours = self._hooks.install() or self._is_ours
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            if not _mains:  # of a main() that was taken out of its module before the patch
                _end_run(error is None)
        finally:
            if self._is_ours:
                self._hooks.undo()


def patch() -> Patch:
    """Hook the training events into open_clip's training program.

    Idempotent, and the same whether ``open_clip_train.main`` is imported before or after. Stays in
    force until `unpatch`; ``with patch(): ...`` takes it back at its end, unless it was in force
    before. For one thread, and one run at a time. A run whose ``main`` was taken out of its module
    before the patch hears RUN_END at the end of the block.

    Raises:
        ImportError: open_clip_train is not installed, or lacks a function, or a function a
            parameter, that the patch hooks (the message names the path looked for and the versions
            known to work).
    """
    try:
        program = importlib.import_module(PROGRAM)
    except ImportError as error:
        raise ImportError(
            f"cannot import {PROGRAM} ({error}); install it with {INSTALL}"
        ) from error
    return Patch(_patches.setdefault(program, _patch_of(program)))


def unpatch() -> None:
    """Put open_clip's own functions back; without a patch in force nothing happens."""
    for hooks in _patches.values():
        hooks.undo()


def run_training(argv: Sequence[str]) -> int:
    """Run open_clip's training program with the patch in force; return its exit status."""
    with patch() as patched:
        status = patched.program.main(list(argv))
    return 0 if status is None else 1
