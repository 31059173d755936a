"""What open_clip is given in place of its own objects, so that a run hears of what it does."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .events import Event
from .patching import Call
from .run import Run


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
