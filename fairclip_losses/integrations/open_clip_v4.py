"""The hooks of open_clip 4's training program, where a task holds model and loss.

Of the functions that ``open_clip_train.main`` looks up, ``create_task`` stands in the place of
``create_loss`` (and runs before ``get_data``), batches are dicts, and the training loop hands on a
state of its own. What a callback sees is the same as with the released versions: events in the
order that `Event` gives, and ``state.batch`` a tuple, of the entries that the task names as its
data (images and texts). Other entries of a batch stay where they are.

open_clip passes whole batches on to the model where it accumulates gradients or distils, so nothing
of ours is left in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch

from ..errors import UsageError
from .csv_pairs import PREFIX
from .events import Event
from .hooked import HookedLoader, HookedLoss, of_a_run
from .patching import Call, Hook
from .run import Run

KNOWN_VERSIONS = "open_clip_torch 4.2.0.dev0"
_EVALUATED = ("val", "imagenet-val", "imagenet-v2", "audio-zeroshot")


class TaskLoss(HookedLoss):
    """`HookedLoss` for a program that compiles its loss too: callbacks stay out of the graph."""

    forward = cast(Any, torch.compiler.disable)(HookedLoss.forward)


class _Tuples:
    """open_clip's loader, with each batch as callbacks see it."""

    def __init__(self, loader: Any, keys: tuple[str, ...]) -> None:
        self._loader = loader
        self._keys = keys
        self.batch: Mapping[str, Any] = {}  # the last one, as open_clip's loader made it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for batch in self._loader:
            self.batch = batch
            beside = (value for name, value in batch.items() if name.startswith(PREFIX))
            yield (*(batch[key] for key in self._keys), *beside)


class TaskLoader(HookedLoader):
    """`HookedLoader` for batches that are dicts."""

    def __init__(self, loader: Any, run: Run, keys: tuple[str, ...]) -> None:
        self._tuples = _Tuples(loader, keys)
        super().__init__(self._tuples, run)
        self._dicts = loader
        self._keys = keys

    def __iter__(self) -> Iterator[Any]:
        if not self._run.awaits_pass:  # a callback's pass, which fires no events
            yield from self._dicts
            return
        for values in super().__iter__():
            if not isinstance(values, (tuple, list)) or len(values) != len(self._keys):
                got = type(values).__name__
                got = f"{len(values)} values" if isinstance(values, (tuple, list)) else got
                keys = ", ".join(self._keys)
                raise ValueError(f"state.batch must be ({keys}) when open_clip gets it, got {got}")
            batch = self._tuples.batch.items()
            rest = {name: value for name, value in batch if not name.startswith(PREFIX)}
            yield rest | dict(zip(self._keys, values, strict=True))


@of_a_run
def _create_task(call: Call, run: Run) -> Any:
    task = call.proceed()
    if getattr(task, "loss", None) is None and vars(call["args"]).get("fair_loss"):
        raise UsageError(
            f"--fair-loss needs a model that is trained by a contrastive loss; "
            f"{type(task).__name__}, of --model {call['args'].model}, has none"
        )
    run.state.task = task
    return task


@of_a_run
def _get_data(call: Call, run: Run) -> Any:
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
def _train_one_epoch(call: Call, run: Run) -> Any:
    state, its_state = run.state, call["state"]
    state.model = its_state.task.trainable_module
    state.optimizer, state.scaler = its_state.optimizer, its_state.scaler
    state.tb_writer, state.epoch = call["tb_writer"], its_state.epoch
    with run.epoch(evaluated=any(name in call["data"] for name in _EVALUATED)):
        return call.proceed()


@of_a_run
def _evaluate(call: Call, run: Run) -> Any:
    model = call["task"].trainable_module
    return run.evaluate(call.proceed, model, call["epoch"], call["tb_writer"])


_TASK = ("args", "model", "dist_model", "naflex_data_config")
_DATA = ("args", "preprocess_fns", "epoch", "tokenizer")
_EPOCH = ("state", "data", "args", "tb_writer")
_EVALUATION = ("task", "data", "epoch", "args", "tb_writer", "tokenizer")
HOOKS = (
    Hook("create_task", _create_task, reads=("args",), known=_TASK),
    Hook("get_data", _get_data, reads=_DATA, known=(*_DATA, "naflex_data_config")),
    Hook("train_one_epoch", _train_one_epoch, reads=_EPOCH, known=_EPOCH),
    Hook("evaluate", _evaluate, reads=("task", "epoch", "args", "tb_writer"), known=_EVALUATION),
)
