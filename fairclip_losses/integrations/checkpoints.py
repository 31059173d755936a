"""Callbacks' state beside open_clip's checkpoints, so that a resumed run goes on as it was.

The state of the checkpoint of epoch N is ``epoch_N.fair``: open_clip resumes from the last ``*.pt``
of the folder and must not take one of these. Which file belongs to a checkpoint is decided by the
epoch that the checkpoint records, whatever its name (``epoch_latest.pt``). The file is complete
before open_clip begins its checkpoint, so a run killed between the two resumes from an older
checkpoint whose file is still there, and writes this one anew before the next.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CallbackError, UsageError, one_line

FORMAT = 3
LATEST = "epoch_latest.pt"  # open_clip's name for --save-most-recent
_PLAIN = (type(None), bool, int, float, complex, str, bytes, Tensor, nn.Parameter)


States = dict[str, dict[str, Any]]  # of each callback, by its name


@dataclass
class StateFolder:
    """The folder of a run's checkpoints, and what is known of the checkpoints in it."""

    path: Path
    written: set[int] = field(default_factory=set)  # epochs, by this process
    latest: int | None = None  # epoch of epoch_latest.pt, where known
    resumed: tuple[str, int] | None = None  # the checkpoint resumed from, and its epoch

    @classmethod
    def of_run(cls, args: Any, start_epoch: int) -> StateFolder:
        """Return the folder that open_clip's arguments name."""
        folder = cls(Path(args.checkpoint_path))
        if start_epoch > 0:
            folder.resumed = (str(args.resume), start_epoch)
            if os.path.abspath(args.resume) == os.path.abspath(folder.path / LATEST):
                folder.latest = start_epoch
        return folder

    def write(self, epoch: int, states: States) -> None:
        """Write a file whole or not at all, even if the process is killed meanwhile.

        Raises:
            CallbackError: a state holds what could not be read back; the message says where.
        """
        for name, state in states.items():
            where = f"callback {name} failed at state_dict: state"
            if not isinstance(state, dict):
                raise CallbackError(f"{where} is a {_kind(state)}; expected a dict")
            _check_plain(state, where)
        target = self.path / f"epoch_{epoch}.fair"
        temporary = self.path / f"{target.name}.tmp"
        try:
            with open(temporary, "wb") as file:
                torch.save({"format": FORMAT, "epoch": epoch, "callbacks": states}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self.written.add(epoch)

    def tidy(self) -> None:
        """Remove what a killed run left half written, and files whose checkpoint is gone."""
        for path in self.path.glob("epoch_*.fair*"):
            match = re.fullmatch(r"epoch_(\d+)\.fair(\.tmp)?", path.name)
            if match is not None and (match[2] or not self._has_checkpoint(int(match[1]))):
                path.unlink(missing_ok=True)

    def _has_checkpoint(self, epoch: int) -> bool:
        if (self.path / f"epoch_{epoch}.pt").exists():
            return True
        # A latest one of unknown epoch is an earlier run's.
        of_latest = epoch not in self.written if self.latest is None else epoch == self.latest
        if of_latest and (self.path / LATEST).exists():
            return True
        checkpoint, resumed = self.resumed or ("", 0)  # maybe under a name of the user's own
        own_name = os.path.basename(checkpoint) != LATEST
        return epoch == resumed and own_name and os.path.exists(checkpoint)


def is_due(args: Any, completed: int) -> bool:
    """Whether open_clip will save a checkpoint of this epoch, by its own rules."""
    if not args.logs or args.logs.lower() == "none":
        return False
    by_frequency = args.save_frequency > 0 and completed % args.save_frequency == 0
    return bool(by_frequency or completed == args.epochs or args.save_most_recent)


def read_states(checkpoint: str, epoch: int) -> States:
    """Return the states saved with a checkpoint of ``epoch``, a path or, as for open_clip, a URL.

    Raises:
        UsageError: there is none, or the file is not one of these.
    """
    import fsspec  # comes with torch

    path = os.path.join(os.path.dirname(checkpoint), f"epoch_{epoch}.fair")
    try:
        # complex is not among what torch 2.5 takes for safe; open_clip opens checkpoints likewise.
        with torch.serialization.safe_globals([complex]), fsspec.open(path, "rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
        if (found := content.get("format")) != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {found}")
        states: States = content["callbacks"]
        saved = content["epoch"]
        if not isinstance(states, dict) or not all(isinstance(s, dict) for s in states.values()):
            raise ValueError("expected a dict of the state of each callback")
    except FileNotFoundError:
        raise UsageError(
            f"no saved state of epoch {epoch} beside the checkpoint ({path})"
        ) from None
    except Exception as error:  # whatever a damaged or foreign file makes the reader raise
        raise UsageError(f"{path} is no saved state: {one_line(error)}") from error
    if saved != epoch:
        raise UsageError(f"{path} is the saved state of epoch {saved}, not {epoch}")
    return states


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
