"""The miner's findings as files and figures that a reader of the data set can use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..data import CodeBook, Table, write_table
from ..miners import MinerReport

FlagRates = dict[str, dict[str, float]]


def _rows_of(report: MinerReport, ids: Tensor) -> npt.NDArray[np.int64]:
    """Return the table row of each entry of the report."""
    order = np.argsort(ids.numpy(), kind="stable")
    rows: npt.NDArray[np.int64] = order[np.searchsorted(ids.numpy(), report.ids, sorter=order)]
    return rows


def flag_rates(report: MinerReport, ids: Tensor, codes: Tensor, codebook: CodeBook) -> FlagRates:
    """Return attribute -> label -> share of the group's pairs seen so far that are flagged.

    Mining can silently down-weight a minority: these are the figures to watch. A group of which
    nothing was seen has no entry; pairs of unknown group count in none.
    """
    flagged = report.kind != "clean"
    group_codes = codes.numpy()[_rows_of(report, ids)]
    rates: FlagRates = {}
    for column, (attribute, labels) in enumerate(codebook.labels.items()):
        rates[attribute] = {
            label: float(flagged[group_codes[:, column] == code].mean())
            for code, label in enumerate(labels)
            if (group_codes[:, column] == code).any()
        }
    return rates


def write_pairs(
    path: Path,
    report: MinerReport,
    ids: Tensor,
    table: Table,
    pair_columns: tuple[str, str],
    attributes: Sequence[str],
    *,
    flagged_only: bool,
) -> None:
    """Write id, file, caption, group values, visits, mean loss, z-score and kind of each pair.

    The most suspicious pair (highest z-score) comes first.
    """
    order = np.argsort(-report.z_score, kind="stable")
    if flagged_only:
        order = order[report.kind[order] != "clean"]
    rows = _rows_of(report, ids)
    columns = [table.column(name) for name in (*pair_columns, *attributes)]
    write_table(
        path,
        ("id", "file", "caption", *attributes, "visits", "mean_loss", "z_score", "kind"),
        (
            (
                report.ids[k],
                *(column[rows[k]] for column in columns),
                report.visits[k],
                f"{report.history[k]:.6g}",
                f"{report.z_score[k]:.4f}",
                report.kind[k],
            )
            for k in order
        ),
    )
