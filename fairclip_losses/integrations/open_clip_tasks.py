"""The hooks of open_clip 4's training program, where a task holds model and loss.

Of the functions that ``open_clip_train.main`` looks up, ``create_task`` stands in the place of
``create_loss`` (and runs before ``get_data``), batches are dicts, and the training loop hands on a
state of its own. What a callback sees is the same as with the released versions: events in the
order that `Event` gives, and ``state.batch`` a tuple, of the entries that the task names as its
data (images and texts). Other entries of a batch stay where they are.

The host passes whole batches on to the model where it accumulates gradients or distils, so nothing
of ours is left in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

from torch._compile import _disable_dynamo

from ..errors import UsageError
from .events import Event
from .hooked import HookedLoader, HookedLoss, of_a_run
from .patching import Hook, HostCall
from .runs import Run
from .samples import as_dict, as_tuple

KNOWN_VERSIONS = "open_clip_torch 4.2.0.dev0"
_EVALUATED = ("val", "imagenet-val", "imagenet-v2", "audio-zeroshot")

_F = TypeVar("_F", bound=Callable[..., Any])


def _eager(function: _F) -> _F:
    disable: Any = _disable_dynamo
    return cast(_F, disable(function))


class TaskLoss(HookedLoss):
    """`HookedLoss` for a host that compiles its loss too: callbacks stay out of the graph."""

    forward = _eager(HookedLoss.forward)


class _Tuples:
    """The host's loader, with each batch as callbacks see it."""

    def __init__(self, loader: Any, keys: tuple[str, ...]) -> None:
        self._loader = loader
        self._keys = keys
        self.batch: Mapping[str, Any] = {}  # the last one, as the host's loader made it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for batch in self._loader:
            self.batch = batch
            yield as_tuple(batch, self._keys)


class TaskLoader(HookedLoader):
    """`HookedLoader` for a host whose batches are dicts."""

    def __init__(self, loader: Any, run: Run, keys: tuple[str, ...]) -> None:
        self._tuples = _Tuples(loader, keys)
        super().__init__(self._tuples, run)
        self._dicts = loader
        self._keys = keys

    def __iter__(self) -> Iterator[Any]:
        if not self._run.pass_due:  # a callback's pass, which fires no events
            yield from self._dicts
            return
        for values in super().__iter__():
            yield as_dict(values, self._keys, self._tuples.batch)


@of_a_run
def _create_task(call: HostCall, run: Run) -> Any:
    task = call.proceed()
    if getattr(task, "loss", None) is None and vars(call["args"]).get("fair_loss"):
        raise UsageError(
            f"--fair-loss needs a model that is trained by a contrastive loss; "
            f"{type(task).__name__}, of --model {call['args'].model}, has none"
        )
    run.state.task = task
    return task


@of_a_run
def _get_data(call: HostCall, run: Run) -> Any:
    data = call.proceed()
    run.take_data(data, call["preprocess_fns"], call["tokenizer"], call["epoch"])
    if "train" in data:
        state, task = run.state, run.state.task
        loader = data["train"].dataloader
        data["train"].dataloader = TaskLoader(loader, run, tuple(task.data_keys))
        if getattr(task, "loss", None) is not None:
            state.loss = task.loss
            run.fire(Event.LOSS_READY)
            task.loss = TaskLoss(run)
        run.restore()
    return data


@of_a_run
def _train_one_epoch(call: HostCall, run: Run) -> Any:
    state, host_state = run.state, call["state"]
    state.model = host_state.task.trainable_module
    state.optimizer, state.scaler = host_state.optimizer, host_state.scaler
    state.tb_writer, state.epoch = call["tb_writer"], host_state.epoch
    with run.epoch(evaluated=any(name in call["data"] for name in _EVALUATED)):
        return call.proceed()


@of_a_run
def _evaluate(call: HostCall, run: Run) -> Any:
    model = call["task"].trainable_module
    return run.evaluate(call.proceed, model, call["epoch"], call["tb_writer"])


HOOKS = (
    Hook(
        "create_task",
        _create_task,
        reads=("args",),
        known=("args", "model", "dist_model", "naflex_data_config"),
    ),
    Hook(
        "get_data",
        _get_data,
        reads=("args", "preprocess_fns", "epoch", "tokenizer"),
        known=("args", "preprocess_fns", "epoch", "tokenizer", "naflex_data_config"),
    ),
    Hook(
        "train_one_epoch",
        _train_one_epoch,
        reads=("state", "data", "args", "tb_writer"),
        known=("state", "data", "args", "tb_writer"),
    ),
    Hook(
        "evaluate",
        _evaluate,
        reads=("task", "epoch", "args", "tb_writer"),
        known=("task", "data", "epoch", "args", "tb_writer", "tokenizer"),
    ),
)
