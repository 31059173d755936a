"""The patch: fires training events inside open_clip's own training program.

``open_clip_train.main`` looks five functions up in its own namespace, and is called there by the
name of ``main``. The patch replaces these names by wrappers that call the originals and fire
`Event`s around them, and copies none of the host's code. A run for which nothing was asked passes
through untouched. The hooks for the shape of open_clip 4 are in `open_clip_tasks`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType, TracebackType
from typing import Any

from . import open_clip_tasks
from .command_line import parse_arguments
from .events import Event
from .hooked import HookedLoader, HookedLoss, of_a_run, run_of
from .patching import Hook, HostCall, HostPatch
from .runs import Run, begin, close_block, open_block

HOST = "open_clip_train.main"
KNOWN_VERSIONS = "open_clip_torch 2.26.1 to 3.3.0"
_FAILED = -1  # what the host returns where it gives up
_EVALUATED = ("val", "imagenet-val", "imagenet-v2")  # the host evaluates where it has one of these


def _main(call: HostCall) -> Any:
    open_block()
    status = _FAILED
    try:
        status = call.proceed()
    finally:
        close_block(lambda run: status is None)
    return status


def _parse_args(call: HostCall) -> Any:
    argv, *others = call.args

    def parse(rest: list[str]) -> Any:
        return call.original(rest, *others, **call.kwargs)

    args = parse_arguments(parse, argv)
    run = run_of(args)
    if run is not None:
        begin(run)
        run.fire(Event.ARGS_PARSED)
    return args


@of_a_run
def _get_data(call: HostCall, run: Run) -> Any:
    data = call.proceed()
    run.take_data(data, call["preprocess_fns"], call["tokenizer"], call["epoch"])
    if "train" in data:
        data["train"].dataloader = HookedLoader(data["train"].dataloader, run)
    return data


@of_a_run
def _create_loss(call: HostCall, run: Run) -> Any:
    loss = call.proceed()
    run.state.loss = loss
    run.fire(Event.LOSS_READY)
    run.restore()
    return HookedLoss(run)


@of_a_run
def _train_one_epoch(call: HostCall, run: Run) -> Any:
    state = run.state
    state.model, state.optimizer, state.scaler = call["model"], call["optimizer"], call["scaler"]
    state.tb_writer, state.epoch = call["tb_writer"], call["epoch"]
    with run.epoch(evaluated=any(name in call["data"] for name in _EVALUATED)):
        return call.proceed()


@of_a_run
def _evaluate(call: HostCall, run: Run) -> Any:
    return run.evaluate(call.proceed, call["model"], call["epoch"], call["tb_writer"])


_COMMON_HOOKS = (Hook("main", _main), Hook("parse_args", _parse_args))
_HOOKS = (
    *_COMMON_HOOKS,
    Hook(
        "get_data",
        _get_data,
        reads=("args", "preprocess_fns", "epoch", "tokenizer"),
        known=("args", "preprocess_fns", "epoch", "tokenizer"),
    ),
    Hook("create_loss", _create_loss, reads=("args",), known=("args",)),
    Hook(
        "train_one_epoch",
        _train_one_epoch,
        reads=("model", "data", "epoch", "optimizer", "scaler", "args", "tb_writer"),
        known=("model", "data", "loss", "epoch", "optimizer", "scaler", "scheduler", "dist_model",
               "args", "tb_writer"),
    ),
    Hook(
        "evaluate",
        _evaluate,
        reads=("model", "epoch", "args", "tb_writer"),
        known=("model", "data", "epoch", "args", "tb_writer", "tokenizer"),
    ),
)  # fmt: skip
HOOKS = tuple(hook.name for hook in _HOOKS)


def _hooks_of(host: ModuleType) -> HostPatch:
    """Return the hooks that fit a host's shape: told by what it has, not by its version."""
    if hasattr(host, "create_task"):
        hooks = (*_COMMON_HOOKS, *open_clip_tasks.HOOKS)
        return HostPatch(host, hooks, open_clip_tasks.KNOWN_VERSIONS)
    return HostPatch(host, _HOOKS, KNOWN_VERSIONS)


class Patch:
    """What `patch` returns: the patch in force, and a context manager that takes it back."""

    def __init__(self, hooks: HostPatch) -> None:
        self.host = hooks.host
        self._hooks = hooks
        hooks.keep(self)

    def __enter__(self) -> Patch:
        self._hooks.enter()
        self._hooks.release(self)  # the block holds from here on
        open_block()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            # Of a main() that was taken out of its module before the patch; the others have ended.
            close_block(lambda run: error is None and run.state.data is not None)
        finally:
            self._hooks.leave()


_hosts: dict[ModuleType, HostPatch] = {}


def patch() -> Patch:
    """Hook the training events into open_clip's training program.

    Idempotent, and the same whether ``open_clip_train.main`` is imported before or after. Stays in
    force until `unpatch`; ``with patch(): ...`` takes it back at its end, unless it was in force
    before or another block, maybe of another thread, is still open. A run whose ``main`` was taken
    out of its module before the patch hears RUN_END at the end of the block.

    Raises:
        ImportError: open_clip_train is not installed, or lacks a function, or a function a
            parameter, that the patch hooks (the message names the path looked for and the versions
            known to work).
    """
    host = _load_host()
    return Patch(_hosts.setdefault(host, _hooks_of(host)))


def unpatch() -> None:
    """Put the host's own functions back; without a patch in force nothing happens.

    What a ``with patch()`` block or a run under way still needs stays hooked until their end.
    """
    for hooks in tuple(_hosts.values()):
        hooks.release()


def _load_host() -> ModuleType:
    try:
        return importlib.import_module(HOST)
    except ImportError as error:
        raise ImportError(
            f"cannot import {HOST} ({error}); install it with pip install 'fairclip_losses[train]'"
        ) from error


def run_training(argv: Sequence[str]) -> int:
    """Run open_clip's training program with the patch in force; return its exit status.

    Raises:
        UsageError: flags or data that do not fit, before training.
        CallbackError: a callback failed.
    """
    with patch() as patched:
        status = patched.host.main(list(argv))
    return 0 if status is None else 1
