"""What a run tells of its pairs: tables of the flagged, flag rates of groups, logged scalars."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.groups import CodeBook
from ..data.tables import IntArray, write_table
from ..distributed import Processes
from ..miners import MinerReport
from .events import TrainState

log = logging.getLogger(__name__)

FlagRates = dict[str, dict[str, float]]  # attribute -> label -> share of its pairs flagged

_PREFIX = "attribute_"
_COLUMNS = {"id", "file", "caption", "shard", "key", "visits", "mean_loss", "z_score", "kind"}


class WarnOnce:
    """Warns in the log of the first process, once of each kind."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._said: set[str] = set()

    def __call__(self, *remarks: str | None, kind: str = "") -> None:
        """Warn of what is not None; without a kind, of what no text said before begins with."""
        for remark in filter(None, remarks):
            key = kind or remark
            is_new = not any(said.startswith(key) for said in self._said)
            if is_new and Processes.of_group().rank == 0:
                self._said.add(key)
                log.warning("%s: %s", self._who, remark)


def attribute_column(attribute: str) -> str:
    """Return the name of an attribute's column beside those that every report has."""
    taken = attribute in _COLUMNS or attribute.startswith(_PREFIX)
    return f"{_PREFIX}{attribute}" if taken else attribute


def write_pairs(
    path: Path,
    report: MinerReport,
    describe: Callable[[IntArray], Mapping[str, Sequence[object]]],
    *,
    flagged_only: bool,
) -> None:
    """Write id, description, visits, mean loss, z-score and kind of each pair.

    The most suspicious pair (highest z-score) comes first. ``describe`` returns by column name what
    is known of the pairs of given ids.
    """
    order = np.argsort(-report.z_score, kind="stable")
    if flagged_only:
        order = order[report.kind[order] != "clean"]
    described = describe(report.ids[order])
    descriptions = zip(*described.values(), strict=True) if described else [()] * len(order)
    write_table(
        path,
        ("id", *described, "visits", "mean_loss", "z_score", "kind"),
        (
            (report.ids[k], *known, report.visits[k], history, z_score, report.kind[k])
            for k, known in zip(order, descriptions, strict=True)
            for history, z_score in [(f"{report.history[k]:.6g}", f"{report.z_score[k]:.4f}")]
        ),
    )


def count_flagged(
    flagged: npt.NDArray[np.bool_], codes: npt.NDArray[np.integer[Any]], codebook: CodeBook
) -> list[IntArray]:
    """Return for each attribute an array (G, 2): flagged pairs and all pairs of each group."""
    counts = []
    for column, groups in enumerate(codebook.num_groups.values()):
        known = codes[:, column] >= 0
        of_group = [
            np.bincount(codes[mask, column], minlength=groups) for mask in (known & flagged, known)
        ]
        counts.append(np.stack(of_group, axis=1))
    return counts


def rare_groups(
    codes: npt.NDArray[np.integer[Any]], codebook: CodeBook, batch: int, least: int
) -> list[str]:
    """Return in words the groups of which fewer than ``least`` pairs are expected in a batch."""
    pairs, rare = len(codes), []
    for (attribute, labels), of_one in zip(codebook.labels.items(), codes.T, strict=True):
        counts = np.bincount(of_one[of_one >= 0], minlength=len(labels)).tolist()
        for label, seen in zip(labels, counts, strict=True):
            if (expected := batch * seen / pairs) < least:
                rare.append(
                    f"{attribute}={label} ({seen} of {pairs} pairs, {expected:.2g} a batch)"
                )
    return rare


def flag_rates(counts: Iterable[IntArray], codebook: CodeBook) -> FlagRates:
    """Return the flag rates of what `count_flagged` counted.

    Mining can silently down-weight a minority: these are the figures to watch. A group of which
    nothing was seen has no entry; pairs of unknown group count in none.
    """
    return {
        attribute: {
            label: float(flagged / seen)
            for label, (flagged, seen) in zip(labels, of_attribute, strict=True)
            if seen
        }
        for (attribute, labels), of_attribute in zip(codebook.labels.items(), counts, strict=True)
    }


def log_scalars(
    state: TrainState, scalars: Mapping[str, float], step: int, *, wandb_step: int | None = None
) -> None:
    """Write scalars to TensorBoard and W&B where the run reports to them.

    ``wandb_step`` is W&B's step where it counts otherwise than TensorBoard.
    """
    if state.tb_writer is not None:
        for name, value in scalars.items():
            state.tb_writer.add_scalar(name, value, step)
    if getattr(state.args, "wandb", False):
        import wandb

        wandb.log(dict(scalars), step=step if wandb_step is None else wandb_step)
