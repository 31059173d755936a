"""One training run as its callbacks see it; what every host's adapter shares.

An adapter hooks a host's functions, begins a `Run` where the host parses its arguments, gives the
host the objects of `hooked` in place of its own, calls `Run.epoch` and `Run.evaluate` around the
host's steps, and opens a block around its main(), at whose end the runs begun in it end.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from ..distributed import Processes
from ..errors import CallbackError, UsageError, one_line, usage_errors
from .events import CallbackRegistry, Event, TrainState, default_registry
from .fair_evaluation import FairEvaluationCallback
from .fair_options import FairOptions
from .fair_training import FairTrainingCallback
from .flags import load_callback
from .saved_state import (
    SavedStates,
    StateFolder,
    fresh_names,
    has_weights,
    is_due,
    read_parts,
    read_states,
    weights_sample,
)

log = logging.getLogger(__name__)


class Run:
    """One training run under way: its registry, its state and its saved states.

    Runs share nothing but the callbacks of `default_registry`, so any number may be under way in
    a process, one inside another's callback or in several threads.
    """

    def __init__(self, options: FairOptions, args: argparse.Namespace) -> None:
        callbacks = [*default_registry, *(load_callback(spec) for spec in options.fair_callback)]
        if options.fair_eval_label is not None:
            callbacks.append(FairEvaluationCallback(options))
        if options.fair_loss:
            callbacks.append(FairTrainingCallback(options))
        with usage_errors():
            self.registry = CallbackRegistry(callbacks)
        resume = getattr(args, "resume", None)
        if options.fair_fresh_state is not None and not resume:
            raise UsageError("--fair-fresh-state has no effect without --resume; add it or drop it")
        self.fresh = fresh_names(options.fair_fresh_state, self.registry.stateful)
        if self.registry.stateful and resume == "latest" and getattr(args, "remote_sync", None):
            raise UsageError(
                "--resume latest with --remote-sync takes the last of all files of the remote "
                "folder, which may be one of ours; name the checkpoint: --resume URL"
            )
        self.state = TrainState(args=args)
        self.in_epoch = False
        self.pass_due = False  # the host is about to pass over its loader
        self._unsaved: int | None = None  # the epoch completed last, until its state is written
        self._to_be_latest: int | None = None
        self._folder: StateFolder | None = None
        self._resumed: SavedStates | None = None

    def fire(self, event: Event) -> None:
        """Deliver an event of this run to its callbacks."""
        self.registry.fire(event, self.state)

    def take_data(self, data: Any, preprocess: Any, tokenizer: Any, epoch: int) -> None:
        """Note the data that the host has made for a run from this epoch on, and say so."""
        state = self.state
        state.data, state.preprocess, state.tokenizer = data, preprocess, tokenizer
        state.start_epoch = state.epoch = epoch
        if "train" in data:
            self.find_saved_states(epoch)
        self.fire(Event.DATA_READY)

    def find_saved_states(self, epoch: int) -> None:
        """Read what was saved with the checkpoint that the host has resumed.

        Raises:
            UsageError: a callback keeps state, and there is none of it.
        """
        wanted = [name for name in self.registry.stateful if name not in self.fresh]
        if epoch > 0 and self.fresh:
            log.warning("Resuming with a fresh state of %s", ", ".join(sorted(self.fresh)))
        if epoch > 0 and wanted:
            with _way_on():
                self._resumed = read_states(str(self.state.args.resume), epoch)
            for name in self._resumed.callbacks.keys() - self.registry.stateful.keys():
                log.warning("The saved state of %s is left: no such callback in this run", name)

    @contextlib.contextmanager
    def epoch(self, *, evaluated: bool) -> Iterator[None]:
        """Fire the events around the host's training of one epoch.

        ``state.epoch`` and ``state.model`` are set. ``evaluated``: the host will evaluate before
        it saves its checkpoint, so what callbacks learn then is saved as well.
        """
        self._check_weights()
        self._tidy()  # the host has saved its checkpoint of the epoch before
        self.state.batch_index = -1
        self.fire(Event.EPOCH_START)
        self.in_epoch = self.pass_due = True
        try:
            yield
        finally:
            self.in_epoch = self.pass_due = False
        self.fire(Event.EPOCH_END)
        self._unsaved = self.state.epoch + 1
        if not evaluated:
            self._save()

    def evaluate(
        self, evaluation: Callable[[], Any], model: Any, epoch: int, tb_writer: Any
    ) -> Any:
        """Fire the events around the host's evaluation; return the metrics that it returns."""
        state = self.state
        state.model, state.epoch, state.tb_writer = model, epoch, tb_writer
        self.fire(Event.EVAL_START)
        state.metrics = evaluation()
        self.fire(Event.EVAL_END)
        self._save()
        return state.metrics

    def end(self) -> None:
        """Tell the callbacks that the run has come to a good end."""
        self._tidy()
        self.fire(Event.RUN_END)

    def let_go(self) -> None:
        """Hold nothing of the host's any longer, however the run has ended.

        The arguments, the loader and the loss hold the run, and its state holds them: the data and
        their workers would stay until the garbage collector comes by.
        """
        self.state = TrainState()
        self._resumed = None

    def restore(self) -> None:
        """Give the callbacks what `find_saved_states` found; LOSS_READY has come.

        Raises:
            UsageError: it does not fit this run.
        """
        if self._resumed is None:
            return
        with _way_on():
            self.registry.load_state_dict(self._resumed.callbacks, self.fresh)
            if self._resumed.parts:
                parts = functools.partial(read_parts, str(self.state.args.resume), self._resumed)
                self.registry.load_part_state_dicts(
                    lambda: (part.callbacks for part in parts()), self.fresh
                )
        names = ", ".join(name for name in self.registry.stateful if name not in self.fresh)
        log.info("Resumed the state of epoch %d of %s", self._resumed.epoch, names)
        self._resumed.callbacks.clear()  # theirs now

    def _check_weights(self) -> None:
        """Refuse, once the model is there, a state that was saved with another one's weights."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None and not has_weights(self.state.model, resumed.weights):
            with _way_on():
                raise UsageError(
                    f"the saved state of epoch {resumed.epoch} beside {self.state.args.resume} "
                    "was saved with other weights than this checkpoint's"
                )

    def _save(self) -> None:
        """Write the callbacks' state just before the host saves its checkpoint, if it will."""
        completed, self._unsaved = self._unsaved, None
        args = self.state.args
        if completed is None or not self.registry.stateful or not is_due(args, completed):
            return
        states = self.registry.state_dict()  # in every process: they may gather
        parts = self.registry.part_state_dict()
        if not (parts or args.save_logs):
            return
        world_size = getattr(args, "world_size", 1)
        sample = weights_sample(self.state.model)
        if parts:
            self._write_part(SavedStates(completed, world_size, sample, parts))
        if args.save_logs:
            self._states_folder().write(
                SavedStates(completed, world_size, sample, states, world_size if parts else 0)
            )
            if args.save_most_recent:
                self._to_be_latest = completed  # once the host has saved it

    def _write_part(self, part: SavedStates) -> None:
        """Write this process's part, and wait until every process has written its own."""
        args = self.state.args
        processes = Processes(getattr(args, "rank", 0), part.world_size)
        try:
            self._states_folder().write(part, processes)
        except (CallbackError, OSError, RuntimeError) as error:
            text = one_line(error)
            raise CallbackError(f"a part of the state could not be saved: {text}") from None

    def _tidy(self) -> None:
        """Remove states whose checkpoint the host has removed, after it has saved the last."""
        if self.registry.stateful and getattr(self.state.args, "save_logs", False):
            folder = self._states_folder()
            if self._to_be_latest is not None:
                folder.latest, self._to_be_latest = self._to_be_latest, None
            folder.tidy()

    def _states_folder(self) -> StateFolder:
        if self._folder is None:
            self._folder = StateFolder.of_run(self.state.args, self.state.start_epoch)
        return self._folder


@contextlib.contextmanager
def _way_on() -> Iterator[None]:
    """Say how to go on without the saved state."""
    try:
        yield
    except UsageError as error:
        raise UsageError(
            f"{error}; add --fair-fresh-state to go on with fresh states, or --fair-fresh-state "
            "NAME to start only that callback afresh"
        ) from error


# The runs begun within each call of a host's main(), or block of a patch, of this context; the
# innermost last. A thread begins with none.
_begun: ContextVar[tuple[list[Run], ...]] = ContextVar("fairclip_losses_runs", default=())


def begin(run: Run) -> None:
    """Note a run that the host has begun, to be ended by the owner of the innermost block."""
    if _begun.get():
        _begun.get()[-1].append(run)


def open_block() -> None:
    """Open a block that collects the runs begun in it, to the matching `close_block`."""
    _begun.set((*_begun.get(), []))


def close_block(ended_well: Callable[[Run], bool]) -> None:
    """Close the innermost block: end the runs begun in it that ended well, and let all go."""
    *outer, runs = _begun.get()
    _begun.set(tuple(outer))
    try:
        for run in runs:
            if ended_well(run):
                run.end()
    finally:
        for run in runs:
            run.let_go()
