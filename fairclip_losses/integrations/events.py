"""Training events, callbacks and their registry; knows no training framework."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from ..errors import CallbackError, UsageError


class Event(str, Enum):
    """The moments of a training run at which callbacks are called.

    The loop in pseudocode, every event marked; other lines are the training program's::

        args = parse_args(argv)
        # ARGS_PARSED      args are complete; refuse wrong combinations here
        data = get_data(args)
        # DATA_READY       state.data may be changed (say, the training loader's dataset)
        loss = create_loss(args)
        # LOSS_READY       state.loss may be replaced
        (where the run is resumed, the callbacks' load_state_dict())
        for epoch in range(start_epoch, epochs):
            # EPOCH_START
            for batch in data["train"].dataloader:
                # BATCH_START      state.batch (images, texts) may be replaced; with the fair
                #                  loss it has a third item, of the same pairs, to be kept
                model_out = model(*batch)
                # LOSS_START       state.loss_inputs (model_out by name) may be added to
                losses = loss(**loss_inputs)
                # LOSS_END         state.losses, the dict of loss terms
                backward, optimizer step, log
                # BATCH_END
            # EPOCH_END
            # EVAL_START
            metrics = evaluate(model, data)
            # EVAL_END         state.metrics
            save a checkpoint    (just before it the callbacks' state_dict() is written)
        # RUN_END

    With gradient accumulation over k batches the loss runs only after every k-th batch, and then k
    times on the concatenation of all of them: LOSS_START and LOSS_END come k times a step, and
    ``state.loss_call`` counts them from 0. BATCH_END comes when the loop asks for the next batch or
    finds that there is none, thus after the optimizer step of the batch where there was one.
    EVAL_START and EVAL_END come only where the program evaluates, and RUN_END only where it came to
    a good end.

    Order: the callbacks of `default_registry` in order of registration, then those of
    ``--fair-callback`` in order of the command line, then the evaluation of fairness and the fair
    loss where they are on. Events whose name ends in END are delivered in reverse, so that
    callbacks nest: the fair loss is the last to touch a batch before the loss, and the first to
    hear of the result.
    """

    ARGS_PARSED = "args_parsed"
    DATA_READY = "data_ready"
    LOSS_READY = "loss_ready"
    EPOCH_START = "epoch_start"
    BATCH_START = "batch_start"
    LOSS_START = "loss_start"
    LOSS_END = "loss_end"
    BATCH_END = "batch_end"
    EPOCH_END = "epoch_end"
    EVAL_START = "eval_start"
    EVAL_END = "eval_end"
    RUN_END = "run_end"

    @property
    def is_after(self) -> bool:
        """Whether the event closes something, so that callbacks run in reverse order."""
        return self.value.endswith("_end")


@dataclass
class TrainState:
    """What the training loop has at hand; fields are None until their event has come."""

    args: Any = None
    data: Any = None
    preprocess: Any = None  # (train, evaluation) image transforms
    tokenizer: Any = None
    loss: Any = None
    model: Any = None
    task: Any = None  # model and loss in one, of open_clip 4
    optimizer: Any = None
    scaler: Any = None
    tb_writer: Any = None
    start_epoch: int = 0
    epoch: int = 0  # of EPOCH_* and BATCH_*: the running one; of EVAL_*: the number completed
    batch_index: int = -1  # within the epoch, counting micro-batches
    loss_call: int = 0  # within the optimizer step
    batch: Any = None
    loss_inputs: dict[str, Any] = field(default_factory=dict)
    losses: Any = None
    metrics: dict[str, Any] = field(default_factory=dict)


class Callback:
    """Base class: override the methods of the events that you need.

    Each takes the `TrainState`, and is named ``on_`` and the event's value, such as
    ``on_epoch_end``. A callback observes; what it may change is marked in `Event`.

    A callback whose memory must outlive the process overrides `state_dict` and `load_state_dict`,
    both, and has a `name` that no other such callback of the run has.
    """

    @property
    def name(self) -> str:
        """The name by which errors, the log and saved states speak of this callback."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs; it is saved beside each checkpoint.

        Tensors, numbers, strings, None, and lists, tuples and dicts of these. Called in every
        process (so that what is spread over processes can be gathered), saved by the first.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned when the checkpoint resumed from was saved.

        Called in every process, once, after LOSS_READY. A `UsageError` says what of
        the state does not fit this run.
        """

    def on_args_parsed(self, state: TrainState) -> None:
        """See `Event`; likewise the methods below."""

    def on_data_ready(self, state: TrainState) -> None: ...
    def on_loss_ready(self, state: TrainState) -> None: ...
    def on_epoch_start(self, state: TrainState) -> None: ...
    def on_batch_start(self, state: TrainState) -> None: ...
    def on_loss_start(self, state: TrainState) -> None: ...
    def on_loss_end(self, state: TrainState) -> None: ...
    def on_batch_end(self, state: TrainState) -> None: ...
    def on_epoch_end(self, state: TrainState) -> None: ...
    def on_eval_start(self, state: TrainState) -> None: ...
    def on_eval_end(self, state: TrainState) -> None: ...
    def on_run_end(self, state: TrainState) -> None: ...


CallbackT = TypeVar("CallbackT", bound=Callback)


def _overrides(callback: Callback, method: str) -> bool:
    own = getattr(callback, method)
    return getattr(own, "__func__", own) is not getattr(Callback, method)


def _call(callback: Callback, method: str, *arguments: Any) -> Any:
    """Call a method; what it raises gets its name, even an exit, which would end the run unsaid."""
    try:
        return getattr(callback, method)(*arguments)
    except (CallbackError, UsageError):
        raise
    except (Exception, SystemExit) as error:
        raise CallbackError(
            f"callback {callback.name} failed at {method.removeprefix('on_')}: "
            f"{type(error).__name__}: {error}"
        ) from error


class CallbackRegistry:
    """An ordered collection of callbacks to which events are delivered.

    ``register`` adds at the end and returns the callback; registering one twice is refused.
    A callback that raises (or exits) stops the run with a `CallbackError` that names it and the
    event; a `UsageError` passes as it is, and so does an interrupt from the keyboard.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self._callbacks: list[Callback] = []
        for callback in callbacks:
            self.register(callback)

    def __iter__(self) -> Iterator[Callback]:
        return iter(tuple(self._callbacks))

    def __len__(self) -> int:
        return len(self._callbacks)

    @property
    def stateful(self) -> dict[str, Callback]:
        """Name -> callback, of those that keep state."""
        return {callback.name: callback for callback in self if _overrides(callback, "state_dict")}

    def register(self, callback: CallbackT) -> CallbackT:
        """Add a callback at the end.

        Raises:
            ValueError: it is no `Callback`, is registered already, keeps state under the name of
                another, or overrides one alone of ``state_dict`` and ``load_state_dict``; or it has
                a method ``on_...`` of no event, which would never be called.
        """
        if not isinstance(callback, Callback):
            hint = "; register an instance, not the class" if isinstance(callback, type) else ""
            raise ValueError(f"expected a Callback, got {callback!r}{hint}")
        if any(known is callback for known in self._callbacks):
            raise ValueError(f"callback {callback.name} is registered already")
        known = [f"on_{event.value}" for event in Event]
        for name in dir(type(callback)):
            if name.startswith("on_") and name not in known and callable(getattr(callback, name)):
                near = difflib.get_close_matches(name, known, n=1)
                hint = f", did you mean {near[0]}?" if near else f"; events call {', '.join(known)}"
                raise ValueError(f"callback {callback.name} has {name}, which no event calls{hint}")
        keeps_state = _overrides(callback, "state_dict")
        if keeps_state != _overrides(callback, "load_state_dict"):
            raise ValueError(
                f"callback {callback.name} must override state_dict and load_state_dict together"
            )
        if keeps_state and callback.name in self.stateful:
            raise ValueError(
                f"two callbacks named {callback.name} keep state; give each a `name` of its own"
            )
        self._callbacks.append(callback)
        return callback

    def unregister(self, callback: Callback) -> None:
        """Remove a callback, which must be registered."""
        if not any(known is callback for known in self._callbacks):
            raise ValueError(f"{getattr(callback, 'name', repr(callback))} is not registered")
        self._callbacks = [known for known in self._callbacks if known is not callback]

    def fire(self, event: Event, state: TrainState) -> None:
        """Deliver an event to every callback, after-events in reverse order."""
        for callback in tuple(self)[:: -1 if event.is_after else 1]:
            _call(callback, f"on_{event.value}", state)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the state of each callback that keeps one, by name."""
        return {name: _call(callback, "state_dict") for name, callback in self.stateful.items()}

    def load_state_dict(
        self, states: Mapping[str, dict[str, Any]], fresh: Collection[str] = ()
    ) -> None:
        """Give each callback that keeps state its own back, except those named in ``fresh``.

        Raises:
            UsageError: ``states`` has none for a callback, or a callback raised it.
        """
        mine = {name: own for name, own in self.stateful.items() if name not in fresh}
        missing = [name for name in mine if name not in states]
        if missing:
            raise UsageError(
                f"no saved state of {', '.join(missing)} (there is one of: "
                f"{', '.join(states) or 'none'})"
            )
        for name, callback in mine.items():
            _call(callback, "load_state_dict", states[name])


default_registry = CallbackRegistry()
"""Callbacks of every patched run of this process, before those of the command line."""


def register(callback: CallbackT) -> CallbackT:
    """Add a callback to `default_registry`: it takes part in every patched run of the process."""
    return default_registry.register(callback)
