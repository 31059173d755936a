"""Tables of pairs: the data set's, and the miner's findings for those who know the data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..data import CodeBook, Table, read_table, write_table
from ..errors import usage_errors
from ..miners import MinerReport

FlagRates = dict[str, dict[str, float]]


def is_table(path: str | None, args: Any) -> bool:
    """Whether the host will read a data path as a CSV or TSV file."""
    by_name = args.dataset_type == "auto" and str(path).endswith((".csv", ".tsv"))
    return bool(path) and (args.dataset_type == "csv" or by_name)


def read_pairs(path: str, args: Any) -> Table:
    """Read a table of pairs and see that the host can read it too.

    Raises:
        UsageError: no such file, no table, a missing column, or an image that is not there.
    """
    with usage_errors():
        table = read_table(path, args.csv_separator)
        try:
            images, _ = (table.column(name) for name in (args.csv_img_key, args.csv_caption_key))
        except ValueError as error:
            only = next(iter(table.columns))
            hint = "; is it --csv-separator , ?" if len(table.columns) == 1 and "," in only else ""
            raise ValueError(f"{error} (see --csv-img-key, --csv-caption-key){hint}") from None
        for row, image in enumerate(images, start=1):
            if not os.path.isfile(image):
                raise ValueError(f"{path}: row {row}: no image file {image!r}")
    return table


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
