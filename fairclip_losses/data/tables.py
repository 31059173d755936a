"""Delimited text files, and what their cells mean: group codes, pair ids and class labels.

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
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import reason

IntArray = npt.NDArray[np.int64]

UNKNOWN = -1
"""Group code of a value that is not known: it counts in the whole and in no group."""

MAX_GROUPS = 64
"""A column with more distinct values is an id or a measurement, not a protected attribute."""

OTHERS = "*"
"""After the labels that a user lists: any other value is unknown."""

_MISSING = frozenset({"", "na", "n/a", "nan", "none", "null", "unknown"})
# pandas writes an integer column that has gaps as "1.0": still a whole number.
_WHOLE = re.compile(r"([+-]?)0*(0|[1-9][0-9]*)(?:\.0*)?")
_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf)", re.IGNORECASE)
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
            there = ", ".join(map(repr, self.columns))
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
        expected = "expected a separator of one character, not a quote or line end"
        raise ValueError(f"{expected}, got {separator!r}")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            # A quote that is never closed swallows the rest of the file, and with it this line.
            records = _records(itertools.chain(file, [_END]), separator)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot read the table: {reason(error)}") from error

    if records[-1][1] != [_END]:
        where = f"in the row that starts at line {records[-1][0]}"
        raise ValueError(f'{path}: the quote (") opened {where} is never closed')
    if len(records) == 1:
        raise ValueError(f"{path}: expected a header and rows, got an empty file")
    header = [name.strip() for name in records[0][1]]
    if twice := sorted(name for name, count in Counter(header).items() if count > 1):
        raise ValueError(f"{path}: expected each column name once, got {twice} more than once")
    if len(records) == 2:
        raise ValueError(f"{path}: expected rows below the header, got the header alone")
    for number, (line, cells) in enumerate(records[1:-1], start=1):
        if len(cells) != len(header):
            expected = f"{len(header)} cells separated by {separator!r} as in the header"
            where = f"{path}: row {number} (line {line})"
            raise ValueError(f"{where}: expected {expected}, got {len(cells)}")
    table = Table(str(path), {})
    columns = zip(*(cells for _, cells in records[:-1]), strict=True)
    for name, column in zip(header, columns, strict=True):
        _, *table.columns[name] = stripped = [cell.strip() for cell in column]
        if padded := [row for row, cell in enumerate(stripped) if cell != column[row]]:
            table.padded[name] = padded[0]
    return table


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
    writer = csv.writer(text, delimiter=separator, lineterminator="\n", quoting=quoting)
    writer.writerows(cells)
    write_text(path, text.getvalue())


def encode_attributes(
    table: Table,
    names: Sequence[str],
    codebook: CodeBook | None = None,
    *,
    others_unknown: Collection[str] = (),
) -> tuple[IntArray, CodeBook]:
    """Turn C columns of a table of N rows into group codes, int64 (N, C), and their code book.

    A column of whole numbers gets its labels in numerical order, any other in the order of the
    strings; a label's position is its code. The cells "", NA, N/A, NaN, None, null, unknown (in any
    case) and -1 are `UNKNOWN`. `codebook` has labels decided earlier, which this table must keep
    to (None: it decides), `others_unknown` the attributes of which any other value is unknown.

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
            labels[name] = attribute_labels(cells, where)
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
    if twice := [identity for identity, count in Counter(ids).items() if count > 1]:
        got = f"got {len(twice)} of them more than once ({', '.join(map(str, twice[:3]))})"
        raise ValueError(f"{where}: expected each id once, {got}")
    return np.array(ids, dtype=np.int64)


def encode_labels(table: Table, column: str, num_classes: int) -> tuple[IntArray, tuple[str, ...]]:
    """Turn a column into class codes 0..K-1, int64 (N,), K = num_classes, and the K class names.

    Whole numbers that already lie in 0..K-1 are taken as they are, even where a class does not
    occur. Any others are numbered by their order, numerical or alphabetical.

    Raises:
        ValueError: no such column, a missing label, a number with a fraction, or a number of
            distinct values that is not K.
    """
    if num_classes < 2:
        raise ValueError(f"expected at least 2 classes, got {num_classes}")
    cells = table.column(column)
    where = f"{table.path}: label column {column!r}"
    for row, cell in enumerate(cells, start=1):
        if is_missing(cell):
            raise ValueError(f"{where}: expected a label in every row, got {cell!r} in row {row}")
    labels = attribute_labels(cells, where, limit=None)
    classes = tuple(str(code) for code in range(num_classes))
    if set(labels) <= set(classes):
        labels = classes
    if len(labels) != num_classes:
        got = f"got {len(labels)} distinct values: {shortened(labels)}"
        raise ValueError(f"{where}: expected {num_classes} classes, {got}")
    return GroupCoder(labels).encode(cells, where), labels


def _records(lines: Iterable[str], separator: str) -> list[tuple[int, list[str]]]:
    """List the records that are not blank lines, each with the line on which it starts."""
    reader = csv.reader(lines, delimiter=separator)
    records, start = [], 1
    for cells in reader:
        # An empty cell that is quoted ("") is a row, a line of nothing but spaces is none.
        blank = not cells or (len(cells) == 1 and cells[0] != "" and not cells[0].strip(" \t"))
        if not blank:
            records.append((start, cells))
        start = reader.line_num + 1
    return records


@dataclass(frozen=True)
class CodeBook:
    """What the group codes mean: each attribute's labels, a label's position being its code."""

    labels: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        """Refuse labels that would not give every code one meaning."""
        for name, labels in self.labels.items():
            if not labels or len(set(labels)) != len(labels):
                expected = "expected at least one label and each label once"
                raise ValueError(f"attribute {name!r}: {expected}, got {list(labels)}")

    @property
    def num_groups(self) -> dict[str, int]:
        """The number of groups of each attribute."""
        return {name: len(labels) for name, labels in self.labels.items()}

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the code book as a JSON object, attribute name to list of labels."""
        write_text(path, json.dumps(self.labels, indent=2) + "\n")


def attribute_labels(
    cells: Iterable[str], where: str, limit: int | None = MAX_GROUPS
) -> tuple[str, ...]:
    """Return a column's labels in order: numerical if all are whole numbers, else by string."""
    distinct = {cell for cell in cells if not is_missing(cell)}
    if all(_WHOLE.fullmatch(value) for value in distinct):
        labels = tuple(sorted(set(map(_canonical, distinct)), key=Decimal))
    elif all(_NUMBER.fullmatch(value) for value in distinct):
        got = f"got the number {min(v for v in distinct if not _WHOLE.fullmatch(v))}"
        raise ValueError(f"{where}: expected whole numbers or names, {got}; bin it first")
    else:
        labels = tuple(sorted(distinct))
    if limit is not None and len(labels) > limit:
        got = f"got {len(labels)} distinct values: an id, or a measurement to be binned first"
        raise ValueError(f"{where}: expected at most {limit} groups, {got} ({shortened(labels)})")
    return labels


def given_labels(text: str, where: str) -> tuple[tuple[str, ...], bool]:
    """Return the labels that a user lists with commas between, their order being their codes.

    And whether the list ends in ``*``: any other value is unknown.

    Raises:
        ValueError: no label, one twice, a mark of the unknown among them, or too many.
    """
    items = [item.strip() for item in text.split(",")]
    others_unknown = items[-1] == OTHERS
    labels = tuple(map(_canonical, items[:-1] if others_unknown else items))
    expected, missing = "expected labels separated by commas", list(filter(is_missing, labels))
    if not labels or OTHERS in labels:
        after = f"and {OTHERS} (any other value is unknown) after the last of them alone"
        raise ValueError(f"{where}: {expected}, {after}")
    if missing:
        got = f"got {missing[0]!r}, which stands for an unknown value"
        raise ValueError(f"{where}: {expected}, {got}")
    if len(set(labels)) != len(labels) or len(labels) > MAX_GROUPS:
        limit = f"expected each label once and at most {MAX_GROUPS}"
        raise ValueError(f"{where}: {limit}, got {len(labels)} labels")
    return labels, others_unknown


class GroupCoder:
    """What an attribute's values are as codes: the one rule, for tables and shards alike.

    A label's code is its position, a missing value is `UNKNOWN`, and any other value is refused,
    or, with ``others_unknown``, unknown too.
    """

    def __init__(self, labels: Sequence[str], *, others_unknown: bool = False) -> None:
        self.labels = labels
        self.others_unknown = others_unknown
        self._codes = {label: position for position, label in enumerate(labels)}

    def code(self, value: str | None) -> int | None:
        """Return a value's code, None where it is refused; None stands for what is no value."""
        default = UNKNOWN if self.others_unknown else None
        if value is None:
            return default
        default = UNKNOWN if is_missing(value) else default
        return self._codes.get(value, self._codes.get(_canonical(value), default))

    def encode(self, cells: Sequence[str], where: str) -> IntArray:
        """Return each cell's code, int64 (N,); a ValueError says which cells are refused."""
        by_cell = {cell: self.code(cell) for cell in set(cells)}
        if refused := Counter(cell for cell in cells if by_cell[cell] is None):
            value, count = refused.most_common(1)[0]
            times = f"{count} row{'s' * (count > 1)}, first in row {cells.index(value) + 1}"
            raise ValueError(f"{where}: {self.expected}, got {value!r} in {times}")
        return np.array([by_cell[cell] for cell in cells], dtype=np.int64)

    @property
    def expected(self) -> str:
        """What to say of a value that is refused."""
        return f"expected one of {shortened(self.labels)}"


def _canonical(value: str) -> str:
    """Write a whole number in one way ("+1", "01" and "1.0" are "1"); leave the rest alone."""
    match = _WHOLE.fullmatch(value)  # not by int, which refuses a few thousand digits
    if match is None:
        return value
    return match[2] if match[1] != "-" or match[2] == "0" else f"-{match[2]}"


def is_missing(value: str) -> bool:
    """Whether a cell says that its value is not known: empty, NA, NaN, None, unknown, -1, ..."""
    return value.lower() in _MISSING or _canonical(value) == str(UNKNOWN)


def shortened(labels: Sequence[str]) -> str:
    """Return the first labels for a message."""
    return ", ".join(map(repr, labels[:8])) + (", ..." if len(labels) > 8 else "")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file that appears whole or not at all, with the folders it needs.

    The text goes to a temporary file in the same folder, which then takes the place of `path`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        # mkstemp makes a private file; give this one the rights that an ordinary new file gets.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
