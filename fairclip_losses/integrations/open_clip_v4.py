"""The hooks of open_clip 4's training program, where a task holds model and loss.

Of the functions that ``open_clip_train.main`` looks up, ``create_task`` stands in the place of
``create_loss`` (and runs before ``get_data``), batches are dicts, and the training loop hands on a
state of its own. What a callback sees is the same as with the released versions: events in the
order that `Event` gives, and ``state.batch`` a tuple, of the entries that the task names as its
data (images and texts). Other entries of a batch stay where they are; ours are taken out, for
open_clip passes whole batches on to the model where it accumulates gradients or distils.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from ..errors import UsageError
from .csv_pairs import PREFIX
from .events import Event
from .patching import Call, Hook
from .run import HookedLoader, HookedLoss, Run, of_a_run

KNOWN_VERSIONS = "open_clip_torch 4.2.0.dev0"


class TaskLoss(HookedLoss):
    """`HookedLoss` for a program that compiles its loss too: callbacks stay out of the graph."""

    forward = cast(Any, torch.compiler.disable)(HookedLoss.forward)


class TaskLoader(HookedLoader):
    """`HookedLoader` for batches that are dicts."""

    def __init__(self, loader: Any, run: Run, keys: tuple[str, ...]) -> None:
        super().__init__(loader, run)
        self._keys = keys

    def as_pair(self, batch: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the entries that are the task's data, and what travels beside them."""
        beside = (value for name, value in batch.items() if name.startswith(PREFIX))
        return (*(batch[key] for key in self._keys), *beside)

    def as_batch(self, pair: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch with the pair in place of its own, and nothing beside it."""
        is_sequence = isinstance(pair, (tuple, list))
        if not is_sequence or len(pair) != len(self._keys):
            raise ValueError(
                f"state.batch must be ({', '.join(self._keys)}) when open_clip gets it, got "
                f"{f'{len(pair)} values' if is_sequence else type(pair).__name__}"
            )
        rest = {name: value for name, value in batch.items() if not name.startswith(PREFIX)}
        return rest | dict(zip(self._keys, pair, strict=True))


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
    state, own = run.state, call["state"]
    state.model, state.optimizer = own.task.trainable_module, own.optimizer
    state.scaler, state.tb_writer, state.epoch = own.scaler, call["tb_writer"], own.epoch
    with run.epoch(call["data"]):
        return call.proceed()


@of_a_run
def _evaluate(call: Call, run: Run) -> Any:
    model = call["task"].trainable_module
    return run.evaluate(call.proceed, model, call["epoch"], call["tb_writer"])


HOOKS = (
    Hook("create_task", _create_task, ("args",)),
    Hook("get_data", _get_data, ("args", "preprocess_fns", "epoch", "tokenizer")),
    Hook("train_one_epoch", _train_one_epoch, ("state", "data", "args", "tb_writer")),
    Hook("evaluate", _evaluate, ("task", "epoch", "args", "tb_writer")),
)
