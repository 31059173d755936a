"""Callbacks' state beside the host's checkpoints, so that a resumed run goes on as it was.

The state of the checkpoint of epoch N is ``epoch_N.fair``: the host resumes from the last ``*.pt``
of the folder and must not take one of these. Which file belongs to a checkpoint is decided by the
epoch that the checkpoint records, whatever its name (``epoch_latest.pt``). The file is complete
before the host begins its checkpoint, so a run killed between the two resumes from an older
checkpoint whose file is still there, and writes this one anew before the next.

What each process holds alone is in a part of its own, ``epoch_N.fair.R-of-W``. All parts are
complete before the first process writes the file that says how many there are.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import Processes
from ..errors import CallbackError, UsageError, one_line

FORMAT = 2
LATEST = "epoch_latest.pt"  # the host's name for --save-most-recent
_SAMPLED = 8  # values of each parameter that tell one checkpoint's weights from another's
_PLAIN = (type(None), bool, int, float, complex, str, bytes, Tensor, nn.Parameter)


@dataclass(frozen=True)
class SavedStates:
    """What a file holds: state by callback, and a sample of the weights of the checkpoint."""

    epoch: int
    world_size: int
    weights: Tensor
    callbacks: dict[str, dict[str, Any]]
    parts: int = 0  # files with what each process held alone


@dataclass
class StateFolder:
    """The folder of a run's checkpoints, and what is known of the checkpoints in it."""

    path: Path
    written: set[int] = field(default_factory=set)  # epochs, by this process
    latest: int | None = None  # epoch of epoch_latest.pt, where known
    resumed: tuple[str, int] | None = None  # the checkpoint resumed from, and its epoch

    @classmethod
    def of_run(cls, args: Any, start_epoch: int) -> StateFolder:
        """Return the folder that the host's arguments name."""
        folder = cls(Path(args.checkpoint_path))
        if start_epoch > 0:
            folder.resumed = (str(args.resume), start_epoch)
            if os.path.abspath(args.resume) == os.path.abspath(folder.path / LATEST):
                folder.latest = start_epoch
        return folder

    def file(self, epoch: int, part: Processes | None = None) -> Path:
        """Return where the state of an epoch is kept, or one process's part of it."""
        return self.path / _file_name(epoch, part)

    def write(self, states: SavedStates, part: Processes | None = None) -> None:
        """Write a file whole or not at all, even if the process is killed meanwhile.

        Raises:
            CallbackError: a state holds what could not be read back; the message says where.
        """
        for name, state in states.callbacks.items():
            where = f"callback {name} failed at state_dict: state"
            if not isinstance(state, dict):
                raise CallbackError(f"{where} is a {_kind(state)}; expected a dict")
            _check_plain(state, where)
        target = self.file(states.epoch, part)
        temporary = target.with_name(f"{target.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save({"format": FORMAT, **vars(states)}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(self.path)
        self.written.add(states.epoch)

    def tidy(self) -> None:
        """Remove what a killed run left half written, and files whose checkpoint is gone."""
        for path in self.path.glob("epoch_*.fair*"):
            match = re.fullmatch(r"epoch_(\d+)\.fair(\.\d+-of-\d+)?(\.tmp)?", path.name)
            if match is not None and (match[3] or not self._has_checkpoint(int(match[1]))):
                path.unlink(missing_ok=True)

    def _has_checkpoint(self, epoch: int) -> bool:
        if self.file(epoch).with_suffix(".pt").exists():
            return True
        if (self.path / LATEST).exists():
            # Of unknown epoch it is an earlier run's.
            of_latest = epoch not in self.written if self.latest is None else epoch == self.latest
            if of_latest:
                return True
        # Resumed from under a name of the user's own.
        checkpoint, resumed = self.resumed or ("", 0)
        own_name = os.path.basename(checkpoint) != LATEST
        return epoch == resumed and own_name and os.path.exists(checkpoint)


def is_due(args: Any, completed: int) -> bool:
    """Whether the host will save a checkpoint of this epoch, by its own rules."""
    if not args.logs or args.logs.lower() == "none":
        return False
    by_frequency = completed == args.epochs or (
        args.save_frequency > 0 and completed % args.save_frequency == 0
    )
    return bool(by_frequency or args.save_most_recent)


def _file_name(epoch: int, part: Processes | None) -> str:
    name = f"epoch_{epoch}.fair"
    return name if part is None else f"{name}.{part.rank}-of-{part.world_size}"


def read_parts(checkpoint: str, states: SavedStates) -> Iterator[SavedStates]:
    """Yield what each process held alone when ``states`` was saved, one process after the other.

    Raises:
        UsageError: one is not there, is no such file, or is of another saving.
    """
    for rank in range(states.parts):
        part = read_states(checkpoint, states.epoch, Processes(rank, states.parts))
        if not torch.equal(part.weights.nan_to_num(), states.weights.nan_to_num()):
            raise UsageError(
                f"part {rank} of {states.parts} of the saved state of epoch {states.epoch} beside "
                f"{checkpoint} was saved with other weights than the rest"
            )
        yield part


def read_states(checkpoint: str, epoch: int, part: Processes | None = None) -> SavedStates:
    """Return what was saved with a checkpoint of ``epoch``, a path or, as for the host, a URL.

    Raises:
        UsageError: there is none, or the file is not one of these.
    """
    path = os.path.join(os.path.dirname(checkpoint), _file_name(epoch, part))
    try:
        # Not among what torch 2.5 takes for safe.
        with torch.serialization.safe_globals([complex]):
            if "://" in path:
                import fsspec  # comes with torch; the host reads its checkpoint by it

                with fsspec.open(path, "rb") as file:
                    content = torch.load(file, map_location="cpu", weights_only=True)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
        found = content.pop("format", None)
        if found != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {found}")
        states = SavedStates(**content)
        _check_kinds(states)
    except FileNotFoundError:
        raise UsageError(
            f"no saved state of epoch {epoch} beside the checkpoint ({path})"
        ) from None
    except Exception as error:  # whatever a damaged or foreign file makes the reader raise
        raise UsageError(f"{path} is no saved state: {one_line(error)}") from error
    if states.epoch != epoch:
        raise UsageError(f"{path} is the saved state of epoch {states.epoch}, not {epoch}")
    return states


def _check_kinds(states: SavedStates) -> None:
    """Refuse what has the names of a saved state and is none."""
    if not isinstance(states.weights, Tensor):
        raise ValueError(f"expected a sample of the weights, got a {_kind(states.weights)}")
    if type(states.parts) is not int:
        raise ValueError(f"expected a number of parts, got a {_kind(states.parts)}")
    if not isinstance(states.callbacks, dict) or not all(
        isinstance(state, dict) for state in states.callbacks.values()
    ):
        raise ValueError("expected a dict of the state of each callback")


def weights_sample(model: nn.Module | None) -> Tensor:
    """Return a few values of each parameter: equal for equal weights, and not after a step."""
    parameters = [] if model is None else [p.detach() for p in model.parameters()]
    if not parameters:
        return torch.empty(0)
    return torch.cat([p.flatten()[:_SAMPLED].float().cpu() for p in parameters])


def has_weights(model: nn.Module | None, sample: Tensor) -> bool:
    """Whether the sample is of this model's weights, as far as its precision tells."""
    mine = weights_sample(model)
    if mine.shape != sample.shape:
        return False
    position = 0
    for parameter in model.parameters() if model is not None else ():
        # Resumed in half precision, the host has rounded what it saved in full.
        count = min(parameter.numel(), _SAMPLED)
        saved = sample[position : position + count].to(parameter.dtype).float()
        found = mine[position : position + count]
        if not torch.isclose(saved, found, rtol=0, atol=0, equal_nan=True).all():
            return False
        position += count
    return True


def _check_plain(value: Any, where: str) -> None:
    """Refuse what `torch.load` would refuse when it is too late."""
    if isinstance(value, dict) and type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"{where}, key {key!r}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for position, item in enumerate(value):
            _check_plain(item, f"{where}[{position}]")
    elif type(value) not in _PLAIN:
        raise CallbackError(
            f"{where} is a {_kind(value)}; expected tensors, numbers, strings, None, or lists, "
            "tuples and dicts of these"
        )


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _sync_folder(path: Path) -> None:
    """Make a rename outlive a power failure, where the system lets a folder be opened."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fresh_names(asked: Collection[str] | None, stateful: Collection[str]) -> set[str]:
    """Return the callbacks that start afresh by ``--fair-fresh-state [NAME...]``; bare = all.

    Raises:
        UsageError: a name is no callback's that keeps state, or none keeps any.
    """
    if asked is not None and not stateful:
        raise UsageError("--fair-fresh-state has no effect: no callback keeps state in this run")
    unknown = sorted(set(asked or ()) - set(stateful))
    if unknown:
        raise UsageError(
            f"--fair-fresh-state: no callback {', '.join(unknown)} keeps state in this run "
            f"(those that do: {', '.join(stateful)})"
        )
    return set() if asked is None else set(asked) or set(stateful)
