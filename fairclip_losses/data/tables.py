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
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = [
    "MAX_GROUPS",
    "UNKNOWN",
    "CodeBook",
    "Table",
    "encode_attributes",
    "encode_labels",
    "pair_ids",
    "read_table",
    "write_table",
    "write_text",
]

IntArray = npt.NDArray[np.int64]

UNKNOWN = -1
"""Group code of a value that is not known: it counts in the whole and in no group."""

MAX_GROUPS = 64
"""A column with more distinct values is an id or a measurement, not a protected attribute."""

_MISSING = frozenset({"", "na", "n/a", "nan", "none", "null", "unknown"})
_INTEGER = re.compile(r"[+-]?[0-9]+")
# pandas writes an integer column that has gaps as "1.0": still a whole number.
_WHOLE = re.compile(r"([+-]?[0-9]+)(?:\.0*)?")
_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf)", re.IGNORECASE)
# Stands below the last line; Unicode keeps this character out of text.
_END = "\uffff"


@dataclass(frozen=True)
class Table:
    """A delimited text file in memory: its path, and its columns as lists of stripped strings."""

    path: str
    columns: dict[str, list[str]]

    def __len__(self) -> int:
        """Return the number of rows, the header not counted."""
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str) -> list[str]:
        """Return the cells of one column; a ValueError names the columns there are."""
        if name not in self.columns:
            there = ", ".join(repr(column) for column in self.columns)
            raise ValueError(f"{self.path}: no column {name!r}; the columns are {there}")
        return self.columns[name]


@dataclass(frozen=True)
class CodeBook:
    """What the group codes mean: each attribute's labels, a label's position being its code."""

    labels: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        """Refuse labels that would not give every code one meaning."""
        for name, labels in self.labels.items():
            if not labels or len(set(labels)) != len(labels):
                raise ValueError(
                    f"attribute {name!r}: expected at least one label and each label once, "
                    f"got {list(labels)}"
                )

    @property
    def num_groups(self) -> dict[str, int]:
        """The number of groups of each attribute."""
        return {name: len(labels) for name, labels in self.labels.items()}

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the code book as a JSON object, attribute name to list of labels."""
        text = json.dumps({name: list(labels) for name, labels in self.labels.items()}, indent=2)
        write_text(path, text + "\n")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> CodeBook:
        """Read what `to_json` wrote; ValueError where the file is something else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: cannot read the code book: {_reason(error)}") from error
        if not isinstance(content, dict) or not all(
            isinstance(labels, list) and all(isinstance(label, str) for label in labels)
            for labels in content.values()
        ):
            raise ValueError(
                f"{path}: expected a JSON object of attribute names, each with a list of labels"
            )
        try:
            return cls({name: tuple(labels) for name, labels in content.items()})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def read_table(path: str | os.PathLike[str], separator: str = "\t") -> Table:
    r"""Read a delimited text file with a header line.

    UTF-8, with or without a byte order mark; cells may be quoted with `"`. Lines that are empty or
    hold white space alone are skipped, as pandas does.

    Args:
        path: the file.
        separator: one character between the cells. A backslash followed by t, which is what a
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
        raise ValueError(f"{path}: cannot read the table: {_reason(error)}") from error

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
    columns = zip(*(cells for _, cells in rows), strict=True)
    return Table(
        str(path),
        {
            name: [cell.strip() for cell in cells]
            for name, cells in zip(header, columns, strict=True)
        },
    )


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


def encode_attributes(
    table: Table, names: Sequence[str], codebook: CodeBook | None = None
) -> tuple[IntArray, CodeBook]:
    """Turn columns of a table into group codes.

    A column of whole numbers gets its labels in numerical order, any other in the order of the
    strings; a label's position is its code. The cells "", NA, N/A, NaN, None, null, unknown (in any
    case) and -1 are `UNKNOWN`.

    Args:
        table: the N rows.
        names: the C columns to encode.
        codebook: labels decided earlier (by the training set), which this table must keep to.
            None: this table decides.

    Returns:
        Codes, int64 (N, C), in the order of `names`; and the code book of these C attributes.

    Raises:
        ValueError: no names or one twice, no such column, an attribute or a value that the code
            book lacks, numbers with fractions, more than 64 distinct values, or a column with no
            known value.
    """
    if not names or len(set(names)) != len(names):
        raise ValueError(f"expected attribute names, each once, got {list(names)}")
    codes = np.empty((len(table), len(names)), dtype=np.int64)
    labels: dict[str, tuple[str, ...]] = {}
    for position, name in enumerate(names):
        cells = table.column(name)
        where = f"{table.path}: attribute column {name!r}"
        if all(_is_missing(cell) for cell in cells):
            raise ValueError(f"{where}: expected groups, got no known value in {len(cells)} rows")
        if codebook is None:
            labels[name] = _attribute_labels(cells, where)
        elif name in codebook.labels:
            labels[name] = codebook.labels[name]
        else:
            raise ValueError(f"{where}: the code book holds only {sorted(codebook.labels)}")
        codes[:, position] = _codes(cells, labels[name], where)
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
        if not -(2**63) <= int(cell) < 2**63:
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
        if _is_missing(cell):
            raise ValueError(f"{where}: expected a label in every row, got {cell!r} in row {row}")
    labels = _distinct(cells, where)
    classes = tuple(str(code) for code in range(num_classes))
    if set(labels) <= set(classes):
        labels = classes
    if len(labels) != num_classes:
        raise ValueError(
            f"{where}: expected {num_classes} classes, got {len(labels)} distinct values: "
            f"{_shortened(labels)}"
        )
    return _codes(cells, labels, where), labels


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


def _attribute_labels(cells: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the labels of an attribute column, refusing what cannot be a set of groups."""
    labels = _distinct([cell for cell in cells if not _is_missing(cell)], where)
    if len(labels) > MAX_GROUPS:
        raise ValueError(
            f"{where}: expected at most {MAX_GROUPS} groups, got {len(labels)} distinct values: "
            f"an id, or a measurement to be binned first ({_shortened(labels)})"
        )
    return labels


def _distinct(values: Iterable[str], where: str) -> tuple[str, ...]:
    """Return the distinct values in order: numerical if all are whole numbers, else by string."""
    distinct = set(values)
    if all(_WHOLE.fullmatch(value) for value in distinct):
        return tuple(map(str, sorted({int(_canonical(value)) for value in distinct})))
    if all(_NUMBER.fullmatch(value) for value in distinct):
        example = min(value for value in distinct if not _WHOLE.fullmatch(value))
        raise ValueError(
            f"{where}: expected whole numbers or names, got the number {example}; bin it first"
        )
    return tuple(sorted(distinct))


def _codes(cells: Sequence[str], labels: Sequence[str], where: str) -> IntArray:
    """Return the position of each cell's value among the labels, `UNKNOWN` where it is missing."""
    code = {label: position for position, label in enumerate(labels)}
    codes = np.full(len(cells), UNKNOWN, dtype=np.int64)
    strange: Counter[str] = Counter()
    for row, cell in enumerate(cells):
        value = cell if cell in code else _canonical(cell)
        if value in code:
            codes[row] = code[value]
        elif not _is_missing(cell):
            strange[cell] += 1
    if strange:
        value, count = strange.most_common(1)[0]
        raise ValueError(
            f"{where}: expected one of {_shortened(labels)}, got {value!r} in {count} "
            f"row{'s' if count > 1 else ''}"
        )
    return codes


def _canonical(value: str) -> str:
    """Write a whole number in one way ("+1", "01" and "1.0" are "1"); leave the rest alone."""
    match = _WHOLE.fullmatch(value)
    return str(int(match[1])) if match else value


def _is_missing(value: str) -> bool:
    return value.lower() in _MISSING or _canonical(value) == str(UNKNOWN)


def _shortened(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels[:8])) + (", ..." if len(labels) > 8 else "")


def _reason(error: Exception) -> str:
    """Say in one line why a file could not be read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0]
