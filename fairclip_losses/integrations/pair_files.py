"""Tables of pairs: the data set's, and the miner's findings for those who know the data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data import CodeBook, Table, encode_attributes, read_table, write_table
from ..data.groups import IntArray
from ..errors import usage_errors
from ..miners import MinerReport
from .fair_options import FairOptions

FlagRates = dict[str, dict[str, float]]


def is_table(path: str | None, args: Any) -> bool:
    """Whether the host will read a data path as a CSV or TSV file."""
    by_name = args.dataset_type == "auto" and str(path).endswith((".csv", ".tsv"))
    return bool(path) and (args.dataset_type == "csv" or by_name)


def read_pairs(path: str, args: Any) -> Table:
    """Read a table of pairs and see that the host can read it too.

    Raises:
        UsageError: no such file, no table, a missing column, an image that is not there, or white
            space that the host would take as it is.
    """
    with usage_errors():
        table = read_table(path, args.csv_separator)
        try:
            images, _ = (table.column(name) for name in (args.csv_img_key, args.csv_caption_key))
        except ValueError as error:
            only = next(iter(table.columns))
            hint = "; is it --csv-separator , ?" if len(table.columns) == 1 and "," in only else ""
            raise ValueError(f"{error} (see --csv-img-key, --csv-caption-key){hint}") from None
        for name in (args.csv_img_key, args.csv_caption_key):
            if table.padded.get(name) == 0:
                raise ValueError(
                    f"{path}: the name of column {name!r} has white space around it, which is a "
                    "part of it for open_clip; take it off"
                )
        if row := table.padded.get(args.csv_img_key):
            raise ValueError(
                f"{path}: row {row}: white space around the image file {images[row - 1]!r}, which "
                "is a part of its name for open_clip; take it off"
            )
        for row, image in enumerate(images, start=1):
            if not os.path.isfile(image):
                raise ValueError(f"{path}: row {row}: no image file {image!r}")
    return table


def read_groups(table: Table, options: FairOptions) -> tuple[IntArray, CodeBook]:
    """Return the codes (N, C) of ``--fair-attributes``, by the labels given or those there are.

    Raises:
        UsageError: a column that is missing or holds no groups, or a value that is no label.
    """
    labels: dict[str, tuple[str, ...]] = {}
    codes = [np.empty((len(table), 0), dtype=np.int64)]  # bad pair mining alone goes without
    with usage_errors():
        for name in options.fair_attributes:
            given = options.fair_labels.get(name)
            column, book = encode_attributes(
                table,
                [name],
                None if given is None else CodeBook({name: given}),
                others_unknown=options.fair_others_unknown,
            )
            codes.append(column)
            labels |= book.labels
    return np.hstack(codes), CodeBook(labels)


_PREFIX = "attribute_"
_COLUMNS = {"id", "file", "caption", "shard", "key", "visits", "mean_loss", "z_score", "kind"}


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
    write_table(
        path,
        ("id", *described, "visits", "mean_loss", "z_score", "kind"),
        (
            (
                report.ids[k],
                *known,
                report.visits[k],
                f"{report.history[k]:.6g}",
                f"{report.z_score[k]:.4f}",
                report.kind[k],
            )
            for k, known in zip(order, _rows(described, len(order)), strict=True)
        ),
    )


def _rows(columns: Mapping[str, Sequence[object]], count: int) -> Iterable[tuple[object, ...]]:
    return zip(*columns.values(), strict=True) if columns else [()] * count
