"""One training run as its callbacks see it: registry, state, saving and resuming.

The patch begins a `Run` where open_clip parses its arguments, gives open_clip arguments, loader and
loss that know the run in place of its own, and calls the run's methods around open_clip's steps.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn

from ..errors import UsageError, usage_errors
from .checkpoints import StateFolder, is_due, read_states
from .events import Callback, CallbackRegistry, Event, TrainState, default_registry
from .flags import FairOptions, load_callback
from .patching import Call

log = logging.getLogger(__name__)

# open_clip evaluates where it has one of these.
EVALUATED = ("val", "imagenet-val", "imagenet-v2", "audio-zeroshot")


class Run:
    """One training run under way: its registry, its state and its saved states."""

    def __init__(self, options: FairOptions, args: argparse.Namespace) -> None:
        callbacks: list[Callback] = [*default_registry]
        callbacks += [load_callback(spec) for spec in options.fair_callback]
        if options.fair_eval_label is not None:
            from .fair_evaluation import FairEvaluationCallback

            callbacks.append(FairEvaluationCallback(options))
        if options.fair_loss:
            from .fair_training import FairTrainingCallback

            callbacks.append(FairTrainingCallback(options))
        with usage_errors():
            self.registry = CallbackRegistry(callbacks)
        resume = getattr(args, "resume", None)
        if options.fair_fresh_state is not None and not resume:
            raise UsageError("--fair-fresh-state has no effect without --resume; add it or drop it")
        self.fresh = _fresh_names(options.fair_fresh_state, self.registry.stateful)
        if self.registry.stateful and resume == "latest" and getattr(args, "remote_sync", None):
            raise UsageError(
                "--resume latest with --remote-sync takes the last of all files of the remote "
                "folder, which may be one of ours; name the checkpoint: --resume URL"
            )
        self.state = TrainState(args=args)
        self.in_epoch = False
        self.awaits_pass = False  # the training loop is about to pass over its loader
        self._unsaved: int | None = None  # the epoch completed last, until its state is written
        self._to_be_latest: int | None = None

    def fire(self, event: Event) -> None:
        """Deliver an event of this run to its callbacks."""
        self.registry.fire(event, self.state)

    def take_data(self, data: Any, preprocess: Any, tokenizer: Any, epoch: int) -> None:
        """Note the data that open_clip has made for a run from this epoch on, and say so."""
        state = self.state
        state.data, state.preprocess, state.tokenizer = data, preprocess, tokenizer
        state.start_epoch = state.epoch = epoch
        self.fire(Event.DATA_READY)

    @contextlib.contextmanager
    def epoch(self, data: Any) -> Iterator[None]:
        """Fire the events around the training of one epoch, whose number and model are set."""
        self._tidy()  # open_clip has saved its checkpoint of the epoch before
        self.state.batch_index = -1
        self.fire(Event.EPOCH_START)
        self.in_epoch = self.awaits_pass = True
        try:
            yield
        finally:
            self.in_epoch = self.awaits_pass = False
        self.fire(Event.EPOCH_END)
        self._unsaved = self.state.epoch + 1
        # Else what callbacks learn of the evaluation, which comes first, is saved as well.
        if not any(name in data for name in EVALUATED):
            self._save()

    def evaluate(self, inner: Callable[[], Any], model: Any, epoch: int, tb_writer: Any) -> Any:
        """Fire the events around an evaluation of open_clip's; return its metrics."""
        state = self.state
        state.model, state.epoch, state.tb_writer = model, epoch, tb_writer
        self.fire(Event.EVAL_START)
        state.metrics = inner()
        self.fire(Event.EVAL_END)
        self._save()
        return state.metrics

    def end(self) -> None:
        """Tell the callbacks that the run has come to a good end."""
        self._tidy()
        self.fire(Event.RUN_END)

    def let_go(self) -> None:
        """Hold nothing of open_clip's any longer, however the run has ended.

        The arguments, the loader and the loss hold the run, and its state holds them: the data and
        their workers would stay until the garbage collector comes by.
        """
        self.state = TrainState()

    def restore(self) -> None:
        """Give the callbacks what was saved with the checkpoint that open_clip has resumed."""
        epoch = self.state.start_epoch
        if epoch > 0 and self.fresh:
            log.warning("Resuming with a fresh state of %s", ", ".join(sorted(self.fresh)))
        wanted = [name for name in self.registry.stateful if name not in self.fresh]
        if epoch == 0 or not wanted:
            return
        try:
            saved = read_states(str(self.state.args.resume), epoch)
            self.registry.load_state_dict(saved, self.fresh)
        except UsageError as error:
            raise UsageError(
                f"{error}; add --fair-fresh-state to go on with fresh states, or "
                "--fair-fresh-state NAME to start only that callback afresh"
            ) from error
        for name in saved.keys() - self.registry.stateful.keys():
            log.warning("The saved state of %s is left: no such callback in this run", name)
        log.info("Resumed the state of epoch %d of %s", epoch, ", ".join(wanted))

    def _save(self) -> None:
        """Write the callbacks' state just before open_clip saves its checkpoint, if it will."""
        completed, self._unsaved = self._unsaved, None
        args = self.state.args
        if completed is None or not self.registry.stateful or not is_due(args, completed):
            return
        states = self.registry.state_dict()  # in every process: they may gather
        if args.save_logs:  # in the first process alone
            self._folder.write(completed, states)
            if args.save_most_recent:
                self._to_be_latest = completed  # once open_clip has saved it

    def _tidy(self) -> None:
        """Remove states whose checkpoint open_clip has removed, after it has saved the last."""
        if self.registry.stateful and getattr(self.state.args, "save_logs", False):
            if self._to_be_latest is not None:
                self._folder.latest, self._to_be_latest = self._to_be_latest, None
            self._folder.tidy()

    @functools.cached_property
    def _folder(self) -> StateFolder:
        return StateFolder.of_run(self.state.args, self.state.start_epoch)


def _fresh_names(asked: Collection[str] | None, stateful: Collection[str]) -> set[str]:
    """Return the callbacks that start afresh by ``--fair-fresh-state [NAME...]``; bare = all."""
    if asked is not None and not stateful:
        raise UsageError("--fair-fresh-state has no effect: no callback keeps state in this run")
    unknown = sorted(set(asked or ()) - set(stateful))
    if unknown:
        raise UsageError(
            f"--fair-fresh-state: no callback {', '.join(unknown)} keeps state in this run "
            f"(those that do: {', '.join(stateful)})"
        )
    return set() if asked is None else set(asked) or set(stateful)


class HookedArgs(argparse.Namespace):
    """open_clip's arguments with the run beside them.

    The run is in a slot, not in ``__dict__``: open_clip prints and logs ``vars(args)``.
    """

    __slots__ = ("run",)
    run: Run


def of_a_run(hook: Callable[[Call, Run], Any]) -> Callable[[Call], Any]:
    """Return a hook of a function that takes ``args``: calls of no run pass through."""

    @functools.wraps(hook)
    def called(call: Call) -> Any:
        args = call["args"]
        return hook(call, args.run) if isinstance(args, HookedArgs) else call.proceed()

    return called


class HookedLoader:
    """The training loader, firing events around every batch; all else is the loader's own.

    Only the pass of open_clip's training loop fires events: a callback that passes over the loader
    besides gets the batches as they are. Where these are no pairs, a subclass makes them so.
    """

    def __init__(self, loader: Any, run: Run) -> None:
        self._loader = loader
        self._run = run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        if not self._run.awaits_pass:
            yield from self._loader
            return
        self._run.awaits_pass = False
        state = self._run.state
        accum_freq = getattr(state.args, "accum_freq", 1)
        for index, batch in enumerate(self._loader):
            state.batch_index, state.batch = index, self.as_pair(batch)
            if index % accum_freq == 0:
                state.loss_call = 0
            self._run.fire(Event.BATCH_START)
            yield self.as_batch(state.batch, batch)
            self._run.fire(Event.BATCH_END)

    def as_pair(self, batch: Any) -> Any:
        """Return a batch as callbacks see it."""
        return batch

    def as_batch(self, pair: Any, batch: Any) -> Any:
        """Return what open_clip gets: what callbacks have left, and the batch it was."""
        return pair


class HookedLoss(nn.Module):
    """The loss as open_clip calls it, firing events around every call."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.inner = run.state.loss
        self._run = run

    def forward(self, **inputs: Any) -> Any:
        """Call the loss of the run's state with what the callbacks left in ``loss_inputs``."""
        if not self._run.in_epoch:
            raise RuntimeError(
                "the training loop is no longer hooked: unpatch() was called during a run"
            )
        state = self._run.state
        output_dict = inputs.pop("output_dict", False)
        state.loss_inputs = inputs
        self._run.fire(Event.LOSS_START)
        state.losses = self.inner(**state.loss_inputs, output_dict=output_dict)
        self._run.fire(Event.LOSS_END)
        state.loss_inputs = {}  # hold no graph beyond the call
        state.loss_call += 1
        return state.losses
