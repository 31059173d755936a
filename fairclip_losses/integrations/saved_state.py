"""The fair loss's state beside the host's checkpoints, so that a resumed run goes on as it was.

Files are named ``epoch_N.fair``: the host resumes from the last ``*.pt`` of the folder and must not
take one of these. They are written before the host's checkpoint of the same epoch, so a run killed
between the two resumes from an older checkpoint whose file is still there.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import CodeBook
from ..errors import UsageError, one_line
from ..losses import FairLoss

FORMAT = 1
_WAY_ON = "resume with the same, or add --fair-fresh-state to go on with an empty memory"


@dataclass(frozen=True)
class SavedState:
    """State of the loss, the meaning of the group codes, and the flags that it depends on."""

    loss: dict[str, Any]
    labels: dict[str, tuple[str, ...]]
    settings: dict[str, str]

    def restore(self, loss: FairLoss, codebook: CodeBook, settings: dict[str, str]) -> None:
        """Put the state back.

        Raises:
            UsageError: the state is of other settings, groups or parts; the message names them.
        """
        for flag, saved in self.settings.items():
            if settings.get(flag) != saved:
                raise UsageError(
                    f"the saved fair-loss state is of {flag} {saved}, this run of {flag} "
                    f"{settings.get(flag)}; {_WAY_ON}"
                )
        if self.labels != codebook.labels:
            raise UsageError(
                f"the saved fair-loss state has the groups {self.labels}, this run "
                f"{codebook.labels}; {_WAY_ON}"
            )
        try:
            loss.load_state_dict(self.loss)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"the saved fair-loss state does not fit this run (another --fair-preset?): "
                f"{reason}; {_WAY_ON}"
            ) from None


def _path(folder: Path, epoch: int) -> Path:
    return folder / f"epoch_{epoch}.fair"


def save_state(folder: Path, completed_epoch: int, args: Any, saved: SavedState) -> None:
    """Write the state where the host is about to save a checkpoint; drop those it has dropped."""
    by_frequency = completed_epoch == args.epochs or (
        args.save_frequency > 0 and completed_epoch % args.save_frequency == 0
    )
    if by_frequency or args.save_most_recent:
        target = _path(folder, completed_epoch)
        temporary = target.with_suffix(".fair.tmp")
        torch.save({"format": FORMAT, **vars(saved)}, temporary)
        os.replace(temporary, target)
    # The last one's checkpoint may be epoch_latest.pt, so it stays until the next is written.
    for path in folder.glob("epoch_*.fair"):
        match = re.fullmatch(r"epoch_(\d+)\.fair", path.name)
        if match and int(match[1]) < completed_epoch - 1 and not path.with_suffix(".pt").exists():
            path.unlink()


def load_state(folder: Path, epoch: int) -> SavedState:
    """Return the state saved at the end of ``epoch``.

    Raises:
        UsageError: there is none, or the file is not one of these.
    """
    path = _path(folder, epoch)
    if not path.exists():
        raise UsageError(
            f"no fair-loss state of epoch {epoch} beside the checkpoint ({path}); "
            "add --fair-fresh-state to go on with an empty memory"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        return SavedState(**content)
    except Exception as error:
        raise UsageError(f"{path} is no saved fair-loss state: {one_line(error)}") from error
