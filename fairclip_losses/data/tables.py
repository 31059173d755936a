"""Tables of pairs: reading them as open_clip does, their columns and ids, and writing them whole.

    read_table -> Table -> pair_ids                          -> stable ids (N,)
                        -> encode_attributes (in `groups`)   -> group codes (N, C) and a CodeBook
                        -> encode_labels (in `groups`)       -> class codes (N,) and their names

Every mistake in a file is a ValueError of one line that names the file, the column and the row.
Rows are counted from 1 in messages, the header not counted.
"""

from __future__ import annotations

import csv
import io
import os
import re
import string
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError, reason

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Table:
    """A table in memory: its path, and its columns as lists of cells.

    ``has_row_names``: the rows have more cells than the header, whose first pandas puts aside.
    """

    path: str
    columns: dict[str, list[str]]
    has_row_names: bool = False

    def __len__(self) -> int:
        """Return the number of rows, the header not counted."""
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str) -> list[str]:
        """Return the cells of one column, or of the only one so named but for white space.

        Raises:
            ValueError: no such column; the message names those there are, and the separator that
                was meant where the header looks like it.
        """
        alike = [there for there in self.columns if there.strip() == name]
        if name in self.columns or len(alike) == 1:
            return self.columns[name if name in self.columns else alike[0]]
        there = f"the columns are {', '.join(map(repr, self.columns))}"
        hint = _separator_hint(list(self.columns), name)
        raise ValueError(f"{self.path}: no column {name!r}; {there}{hint}")


def _separator_hint(columns: list[str], name: str) -> str:
    """Return "; is it --csv-separator ; ?" where a header was not taken apart, or left quoted."""
    if f'"{name}"' in columns:
        return (
            "; is it --csv-separator $'\\t' ? Two or more characters are a regular expression for "
            "pandas, which leaves the quotes in the cells"
        )
    # A name that a column is split into is sure; else the usual separators are likely.
    marks = {mark: column for column in columns for mark in re.findall(r"[^\w\"]", column)}
    found = [m for m, column in marks.items() if name in [c.strip(' "') for c in column.split(m)]]
    likely = found or [m for m in ",;\t|:" if len(columns) == 1 and m in marks]
    shown = {"\t": "$'\\t'", " ": "' '"}
    return f"; is it --csv-separator {shown.get(likely[0], likely[0])} ?" if likely else ""


def read_table(
    path: str | os.PathLike[str], separator: str = "\t", *, as_open_clip: Collection[str] = ()
) -> Table:
    """Read a table by `pandas.read_csv(path, sep=separator)`, which is how open_clip reads it.

    So the same separators, compressions, URLs, encodings and headers are understood, and the rows
    are the same. The cells of the columns ``as_open_clip`` are what open_clip makes of them,
    `str(value)`: a missing one is "nan", and "007" in a column of numbers is "7". All others are
    text as it stands in the file, without the white space around it, a missing one being "", and
    without the quotes that pandas leaves where the separator is a regular expression.

    Raises:
        ValueError: a table that pandas cannot read or that has no rows.
        UsageError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        install = "pip install 'fairclip_losses[evaluate]'"
        raise UsageError(f"reading tables takes pandas ({error}); install it: {install}") from error
    if not separator:
        raise ValueError(f"expected a separator of one character or more, got {separator!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how pandas reads; in training open_clip says the same
        try:
            header = pd.read_csv(path, sep=separator, nrows=0).columns
            as_text = {name: str for name in header if name not in as_open_clip}
            frame = pd.read_csv(path, sep=separator, dtype=as_text)
        except pd.errors.EmptyDataError:
            raise ValueError(f"{path}: expected a header and rows, got an empty file") from None
        except Exception as error:  # whatever decompressors and servers raise
            what = f"cannot read the table: {_unreadable(error, separator)}"
            raise ValueError(f"{path}: {what}") from error
    if not len(frame):
        raise ValueError(f"{path}: expected rows below the header, got the header alone")
    # Where rows are longer than the header, pandas takes their first cells for names of rows.
    has_row_names = bool(frame.index[0] != 0 or frame.index[-1] != len(frame) - 1)
    if has_row_names and frame.iloc[:, -1].isna().all():
        raise ValueError(
            f"{path}: the rows have more cells than the header, the last of them empty, which "
            f"moves every cell by a column for open_clip; take the {separator!r} off the rows' ends"
        )
    columns = {name: list(map(str, frame[name].tolist())) for name in header}
    around = f'{string.whitespace}"' if len(separator) > 1 else None
    columns |= {name: frame[name].fillna("").str.strip(around).tolist() for name in as_text}
    return Table(str(path), columns, has_row_names)


def _unreadable(error: Exception, separator: str) -> str:
    """Say in a user's words why pandas could not read a table."""
    text = reason(error)
    if isinstance(error, UnicodeError):
        return f"{text}; save it as UTF-8"
    if found := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", text):
        expected = f"expected {found[1]} cells separated by {separator!r} as in the header"
        return f"line {found[2]}: {expected}, got {found[3]}"
    if found := re.search(r"EOF inside string starting at row (\d+)", text):
        return f'the quote (") opened in row {found[1]} is never closed'
    return text


def pair_ids(table: Table, column: str | None = None) -> IntArray:
    """Return a stable id for each row, int64 (N,): the row's position from 0, or a column's value.

    Raises:
        ValueError: no such column, a cell that is not an integer, an integer outside int64, or an
            id that comes more than once.
    """
    if column is None:
        return np.arange(len(table), dtype=np.int64)
    where = f"{table.path}: id column {column!r}"
    ids = []
    for row, cell in enumerate(table.column(column), start=1):
        if not re.fullmatch("[+-]?[0-9]+", cell):
            raise ValueError(f"{where}: expected integers, got {cell!r} in row {row}")
        number = Decimal(cell)  # int by itself refuses a few thousand digits
        if not -(2**63) <= number < 2**63:
            raise ValueError(f"{where}: expected 64-bit integers, got {cell} in row {row}")
        ids.append(int(number))
    if twice := [identity for identity, count in Counter(ids).items() if count > 1]:
        got = f"got {len(twice)} of them more than once ({', '.join(map(str, twice[:3]))})"
        raise ValueError(f"{where}: expected each id once, {got}")
    return np.array(ids, dtype=np.int64)


def write_table(
    path: str | os.PathLike[str],
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    separator: str = ",",
) -> None:
    """Write a header and rows as delimited text that `read_table` and pandas read back.

    The file appears whole or not at all. Cells are written as `str` gives them, None as nothing; a
    ValueError says which row has more or fewer cells than the header.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in (header, *rows)]
    for number, row in enumerate(cells):
        if len(row) != len(header):
            raise ValueError(f"row {number}: expected {len(header)} cells, got {len(row)}")
    # The csv module leaves a lone carriage return unquoted, and readers take it for a line end.
    plain = not any("\r" in cell for row in cells for cell in row)
    quoting: Any = csv.QUOTE_MINIMAL if plain else csv.QUOTE_ALL
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, lineterminator="\n", quoting=quoting).writerows(cells)
    write_text(path, text.getvalue())


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file that appears whole or not at all, with the folders it needs.

    The text goes to a temporary file in the same folder, which then takes the place of `path`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
