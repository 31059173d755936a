"""Delimited text files: rows, protected attributes as group codes, pair ids and class labels.

The readers follow what open_clip's CSV data set does (pandas, blank lines skipped), so that row i
here is sample i there. A cell is a string with the white space around it taken off; what it means
is decided by the function that encodes it:

    read_table -> Table -> encode_attributes -> group codes (N, C) and a CodeBook
                        -> pair_ids          -> stable ids (N,)
                        -> encode_labels     -> class codes (N,) and their names

Every mistake in a file is a ValueError of one line that names the file, the column and the row.
Rows are counted from 1 in messages, the header not counted.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import reason
from . import groups
from .groups import UNKNOWN, CodeBook, GroupCoder, IntArray, write_text

_INTEGER = re.compile(r"[+-]?[0-9]+")
# Zeros before the number included; int by itself refuses a few thousand digits.
MAX_ID_CHARACTERS = 100
# Stands below the last line; Unicode keeps this character out of text.
_END = "\uffff"


@dataclass(frozen=True)
class Table:
    """A delimited text file in memory: its path, and its columns as lists of stripped strings.

    ``padded`` has by column the first row in which white space was taken off, 0 being the header.
    """

    path: str
    columns: dict[str, list[str]]
    padded: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of rows, the header not counted."""
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str) -> list[str]:
        """Return the cells of one column; a ValueError names the columns there are."""
        if name not in self.columns:
            there = ", ".join(repr(column) for column in self.columns)
            raise ValueError(f"{self.path}: no column {name!r}; the columns are {there}")
        return self.columns[name]


def read_table(path: str | os.PathLike[str], separator: str = "\t") -> Table:
    r"""Read a delimited text file with a header line.

    UTF-8, with or without a byte order mark; cells may be quoted with `"`. Lines that are empty or
    hold white space alone are skipped, as pandas does.

    ``separator`` is one character between the cells. A backslash followed by t, which is what a
    shell passes for "\t", is taken as the tab.

    Raises:
        ValueError: no such file, not UTF-8 text, an empty file, a header without rows, a header
            name twice, a row with more or fewer cells than the header, a quote never closed, or a
            separator that is not one character.
    """
    separator = "\t" if separator == "\\t" else separator
    if len(separator) != 1 or separator in '"\r\n':
        raise ValueError(
            f"expected a separator of one character, not a quote or line end, got {separator!r}"
        )
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            # A quote that is never closed swallows the rest of the file, and with it this line.
            records = _records(itertools.chain(file, [_END]), separator)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot read the table: {reason(error)}") from error

    if records[-1][1] != [_END]:
        raise ValueError(
            f'{path}: the quote (") opened in the row that starts at line {records[-1][0]} '
            f"is never closed"
        )
    if len(records) == 1:
        raise ValueError(f"{path}: expected a header and rows, got an empty file")
    header = [name.strip() for name in records[0][1]]
    twice = sorted(name for name, count in Counter(header).items() if count > 1)
    if twice:
        raise ValueError(f"{path}: expected each column name once, got {twice} more than once")
    rows = records[1:-1]
    if not rows:
        raise ValueError(f"{path}: expected rows below the header, got the header alone")
    for number, (line, cells) in enumerate(rows, start=1):
        if len(cells) != len(header):
            raise ValueError(
                f"{path}: row {number} (line {line}): expected {len(header)} cells separated by "
                f"{separator!r} as in the header, got {len(cells)}"
            )
    table = Table(str(path), {})
    columns = zip(*(cells for _, cells in records[:-1]), strict=True)
    for name, column in zip(header, columns, strict=True):
        _, *table.columns[name] = stripped = [cell.strip() for cell in column]
        padded = [row for row, cell in enumerate(stripped) if cell != column[row]]
        if padded:
            table.padded[name] = padded[0]
    return table


def write_table(
    path: str | os.PathLike[str],
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    separator: str = ",",
) -> None:
    """Write a header and rows as delimited text that `read_table` and pandas read back.

    The file appears whole or not at all. Cells are written as `str` gives them, None as nothing.

    Raises:
        ValueError: a row has more or fewer cells than the header.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in (header, *rows)]
    for number, row in enumerate(cells):
        if len(row) != len(header):
            raise ValueError(f"row {number}: expected {len(header)} cells, got {len(row)}")
    # The csv module leaves a lone carriage return unquoted, and readers take it for a line end.
    plain = not any("\r" in cell for row in cells for cell in row)
    text = io.StringIO(newline="")
    csv.writer(
        text,
        delimiter=separator,
        lineterminator="\n",
        quoting=csv.QUOTE_MINIMAL if plain else csv.QUOTE_ALL,
    ).writerows(cells)
    write_text(path, text.getvalue())


def encode_attributes(
    table: Table,
    names: Sequence[str],
    codebook: CodeBook | None = None,
    *,
    others_unknown: Collection[str] = (),
) -> tuple[IntArray, CodeBook]:
    """Turn columns of a table into group codes.

    A column of whole numbers gets its labels in numerical order, any other in the order of the
    strings; a label's position is its code. The cells "", NA, N/A, NaN, None, null, unknown (in any
    case) and -1 are `UNKNOWN`.

    Args:
        table: the N rows.
        names: the C columns to encode.
        codebook: labels decided earlier, which this table must keep to. None: it decides.
        others_unknown: attributes of which a value that the code book lacks is unknown.

    Returns:
        Codes, int64 (N, C), in the order of `names`; and the code book of these C attributes.

    Raises:
        ValueError: no names or one twice, no such column, an attribute that the code book lacks,
            or a value that it lacks and that is not unknown, numbers with fractions, more than 64
            distinct values, or a column with no known value.
    """
    if not names or len(set(names)) != len(names):
        raise ValueError(f"expected attribute names, each once, got {list(names)}")
    codes = np.empty((len(table), len(names)), dtype=np.int64)
    labels: dict[str, tuple[str, ...]] = {}
    for position, name in enumerate(names):
        cells = table.column(name)
        where = f"{table.path}: attribute column {name!r}"
        if codebook is None:
            labels[name] = groups.attribute_labels(cells, where)
        elif name in codebook.labels:
            labels[name] = codebook.labels[name]
        else:
            raise ValueError(f"{where}: the code book holds only {sorted(codebook.labels)}")
        coder = GroupCoder(labels[name], others_unknown=name in others_unknown)
        codes[:, position] = coder.encode(cells, where)
        if (codes[:, position] == UNKNOWN).all():
            raise ValueError(f"{where}: expected groups, got no known value in {len(cells)} rows")
    return codes, CodeBook(labels)


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
        if not _INTEGER.fullmatch(cell):
            raise ValueError(f"{where}: expected integers, got {cell!r} in row {row}")
        if len(cell) > MAX_ID_CHARACTERS or not -(2**63) <= int(cell) < 2**63:
            raise ValueError(f"{where}: expected 64-bit integers, got {cell} in row {row}")
        ids.append(int(cell))
    twice = [identity for identity, count in Counter(ids).items() if count > 1]
    if twice:
        examples = ", ".join(map(str, twice[:3]))
        raise ValueError(
            f"{where}: expected each id once, got {len(twice)} of them more than once ({examples})"
        )
    return np.array(ids, dtype=np.int64)


def encode_labels(table: Table, column: str, num_classes: int) -> tuple[IntArray, tuple[str, ...]]:
    """Turn a column into class codes 0..K-1, K = num_classes.

    Whole numbers that already lie in 0..K-1 are taken as they are, even where a class does not
    occur. Any others are numbered by their order, numerical or alphabetical.

    Returns:
        Codes, int64 (N,); and the K class names.

    Raises:
        ValueError: no such column, a missing label, a number with a fraction, or a number of
            distinct values that is not K.
    """
    if num_classes < 2:
        raise ValueError(f"expected at least 2 classes, got {num_classes}")
    cells = table.column(column)
    where = f"{table.path}: label column {column!r}"
    for row, cell in enumerate(cells, start=1):
        if groups.is_missing(cell):
            raise ValueError(f"{where}: expected a label in every row, got {cell!r} in row {row}")
    labels = groups.attribute_labels(cells, where, limit=None)
    classes = tuple(str(code) for code in range(num_classes))
    if set(labels) <= set(classes):
        labels = classes
    if len(labels) != num_classes:
        raise ValueError(
            f"{where}: expected {num_classes} classes, got {len(labels)} distinct values: "
            f"{groups.shortened(labels)}"
        )
    return GroupCoder(labels).encode(cells, where), labels


def _records(lines: Iterable[str], separator: str) -> list[tuple[int, list[str]]]:
    """List the records that are not blank lines, each with the line on which it starts."""
    reader = csv.reader(lines, delimiter=separator)
    records = []
    start = 1
    for cells in reader:
        # An empty cell that is quoted ("") is a row, a line of nothing but spaces is none.
        blank = not cells or (len(cells) == 1 and cells[0] != "" and not cells[0].strip(" \t"))
        if not blank:
            records.append((start, cells))
        start = reader.line_num + 1
    return records
