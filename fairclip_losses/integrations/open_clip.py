"""The patch: fires training events inside open_clip's own training program.

``open_clip_train.main`` looks five functions up in its own namespace (`HOOKS`). The patch replaces
these names by wrappers that call the originals and fire `Event`s around them, and copies none of
the host's code. A run for which nothing was asked passes through untouched.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from types import ModuleType, TracebackType
from typing import Any

from torch import nn

from ..errors import UsageError
from .events import CallbackRegistry, Event, TrainState, default_registry
from .fair_evaluation import FairEvaluationCallback
from .fair_training import FairTrainingCallback
from .flags import FairOptions, build_parser, load_callback, split_flags

HOST = "open_clip_train.main"
HOOKS = ("parse_args", "get_data", "create_loss", "train_one_epoch", "evaluate")
KNOWN_VERSIONS = "open_clip_torch 2.26.1 to 3.3.0"


class Run:
    """One training run under way: its registry and its state."""

    def __init__(self, options: FairOptions, args: argparse.Namespace) -> None:
        callbacks = [*default_registry, *(load_callback(spec) for spec in options.fair_callback)]
        if options.fair_eval_label:
            callbacks.append(FairEvaluationCallback(options))
        if options.fair_loss:
            callbacks.append(FairTrainingCallback(options))
        self.registry = CallbackRegistry(callbacks)
        self.state = TrainState(args=args)

    def fire(self, event: Event) -> None:
        """Deliver an event of this run to its callbacks."""
        self.registry.fire(event, self.state)


class HookedArgs(argparse.Namespace):
    """The host's arguments with the run beside them.

    The run is in a slot, not in ``__dict__``: the host prints and logs ``vars(args)``.
    """

    __slots__ = ("run",)
    run: Run


class HookedLoader:
    """The training loader, firing events around every batch; all else is the loader's own."""

    def __init__(self, loader: Any, run: Run) -> None:
        self._loader = loader
        self._run = run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        state = self._run.state
        accum_freq = getattr(state.args, "accum_freq", 1)
        for index, batch in enumerate(self._loader):
            state.batch_index, state.batch = index, batch
            if index % accum_freq == 0:
                state.loss_call = 0
            self._run.fire(Event.BATCH_START)
            yield state.batch
            self._run.fire(Event.BATCH_END)


class HookedLoss(nn.Module):
    """The loss as the host calls it, firing events around every call."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.inner = run.state.loss
        self._run = run

    def forward(self, **inputs: Any) -> Any:
        """Call the loss of the run's state with what the callbacks left in ``loss_inputs``."""
        state = self._run.state
        output_dict = inputs.pop("output_dict", False)
        state.loss_inputs = inputs
        self._run.fire(Event.LOSS_START)
        state.losses = self.inner(**state.loss_inputs, output_dict=output_dict)
        self._run.fire(Event.LOSS_END)
        state.loss_inputs = {}  # hold no graph beyond the call
        state.loss_call += 1
        return state.losses


# The run that the last parse_args of this context began, for the end of main() to be told.
_current_run: ContextVar[Run | None] = ContextVar("fairclip_losses_run", default=None)


def _run_of(args: Any) -> Run | None:
    return args.run if isinstance(args, HookedArgs) else None


def _hook_parse_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def parse_args(argv: Sequence[str]) -> Any:
        if any(word in ("-h", "--help") for word in argv):
            print("usage: python -m fairclip_losses.train [open_clip's flags] [--fair-loss ...]\n")
            print(build_parser().format_help())
            print("open_clip's own flags, unchanged:\n")
            return original(argv)
        options, rest = split_flags(argv)
        args = _parse_quietly(original, rest)
        if not (options.active or len(default_registry)):
            return args
        hooked = HookedArgs(**vars(args))
        if options.active:
            vars(hooked).update(vars(options))
        hooked.run = Run(options, hooked)
        _current_run.set(hooked.run)
        hooked.run.fire(Event.ARGS_PARSED)
        return hooked

    return parse_args


def _parse_quietly(parse_args: Callable[..., Any], argv: Sequence[str]) -> Any:
    """Call the host's parser; what it refuses is its one line, without the pages of usage."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return parse_args(argv)
    except SystemExit as stop:
        if not stop.code:
            raise
        message = printed.getvalue().strip().rpartition("error: ")[2]
        raise UsageError(f"{message}{_suggestion(message)}") from None


def _suggestion(message: str) -> str:
    """Return a hint where a flag of ours is misspelt."""
    ours = [flag for action in build_parser()._actions for flag in action.option_strings]
    for word in re.findall(r"--fair[\w-]*", message):
        close = difflib.get_close_matches(word, ours, n=1)
        if close:
            return f" (did you mean {close[0]}?)"
    return ""


def _hook_get_data(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_data(args: Any, preprocess_fns: Any, epoch: int = 0, tokenizer: Any = None) -> Any:
        data = original(args, preprocess_fns, epoch=epoch, tokenizer=tokenizer)
        run = _run_of(args)
        if run is None:
            return data
        state = run.state
        state.data, state.preprocess, state.tokenizer = data, preprocess_fns, tokenizer
        state.start_epoch = state.epoch = epoch
        run.fire(Event.DATA_READY)
        if "train" in data:
            data["train"].dataloader = HookedLoader(data["train"].dataloader, run)
        return data

    return get_data


def _hook_create_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_loss(args: Any) -> Any:
        loss = original(args)
        run = _run_of(args)
        if run is None:
            return loss
        run.state.loss = loss
        run.fire(Event.LOSS_READY)
        return HookedLoss(run)

    return create_loss


def _hook_train_one_epoch(original: Callable[..., Any]) -> Callable[..., Any]:
    def train_one_epoch(
        model: Any, data: Any, loss: Any, epoch: int, optimizer: Any, scaler: Any, scheduler: Any,
        dist_model: Any, args: Any, tb_writer: Any = None,
    ) -> Any:  # fmt: skip
        def call() -> Any:
            return original(
                model, data, loss, epoch, optimizer, scaler, scheduler, dist_model, args,
                tb_writer=tb_writer,
            )  # fmt: skip

        run = _run_of(args)
        if run is None:
            return call()
        state = run.state
        state.model, state.optimizer, state.scaler = model, optimizer, scaler
        state.tb_writer, state.epoch, state.batch_index = tb_writer, epoch, -1
        run.fire(Event.EPOCH_START)
        result = call()
        run.fire(Event.EPOCH_END)
        return result

    return train_one_epoch


def _hook_evaluate(original: Callable[..., Any]) -> Callable[..., Any]:
    def evaluate(
        model: Any, data: Any, epoch: int, args: Any, tb_writer: Any = None, tokenizer: Any = None
    ) -> Any:
        run = _run_of(args)
        if run is not None:
            state = run.state
            state.model, state.epoch, state.tb_writer = model, epoch, tb_writer
            run.fire(Event.EVAL_START)
        metrics = original(model, data, epoch, args, tb_writer=tb_writer, tokenizer=tokenizer)
        if run is not None:
            run.state.metrics = metrics
            run.fire(Event.EVAL_END)
        return metrics

    return evaluate


_WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "parse_args": _hook_parse_args,
    "get_data": _hook_get_data,
    "create_loss": _hook_create_loss,
    "train_one_epoch": _hook_train_one_epoch,
    "evaluate": _hook_evaluate,
}


class Patch:
    """What `patch` returns: the patch in force, and a context manager that takes it back."""

    def __init__(self, host: ModuleType, applied_here: bool) -> None:
        self.host = host
        self._applied_here = applied_here

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._applied_here:
            unpatch()


def patch() -> Patch:
    """Hook the training events into open_clip's training program.

    Idempotent. ``with patch(): ...`` takes the patch back at its end, unless it was in force
    before.

    Raises:
        ImportError: open_clip_train is not installed, or lacks a function that the patch hooks
            (the message names the path looked for and the versions known to work).
    """
    host = _load_host()
    missing = [name for name in HOOKS if not callable(getattr(host, name, None))]
    if missing:
        raise ImportError(
            f"{HOST} has no {', '.join(missing)}; this open_clip differs from the versions known "
            f"to work: {KNOWN_VERSIONS}"
        )
    if all(hasattr(getattr(host, name), "__fairclip_original__") for name in HOOKS):
        return Patch(host, applied_here=False)
    for name in HOOKS:
        original = getattr(host, name)
        if hasattr(original, "__fairclip_original__"):
            continue
        wrapper = _WRAPPERS[name](original)
        wrapper.__fairclip_original__ = original  # type: ignore[attr-defined]
        wrapper.__wrapped__ = original  # type: ignore[attr-defined]
        wrapper.__doc__ = original.__doc__
        setattr(host, name, wrapper)
    return Patch(host, applied_here=True)


def unpatch() -> None:
    """Put the host's own functions back; without a patch in force nothing happens."""
    host = _load_host()
    for name in HOOKS:
        original = getattr(getattr(host, name, None), "__fairclip_original__", None)
        if original is not None:
            setattr(host, name, original)


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
    token = _current_run.set(None)
    try:
        with patch() as patched:
            status = patched.host.main(list(argv))
            run = _current_run.get()
            if run is not None and status is None:
                run.fire(Event.RUN_END)
    finally:
        _current_run.reset(token)
    return 0 if status is None else 1
