"""Tables of pairs, and what their cells mean: group codes, pair ids and class labels.

Tables are read by pandas as open_clip reads them, so that row i here is sample i there. The cells
of a column are text; what they mean is decided by the function that encodes them:

    read_table -> Table -> encode_attributes -> group codes (N, C) and a CodeBook
                        -> pair_ids          -> stable ids (N,)
                        -> encode_labels     -> class codes (N,) and their names

Every mistake in a file is a ValueError of one line that names the file, the column and the row.
Rows are counted from 1 in messages, the header not counted.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError, reason

IntArray = npt.NDArray[np.int64]

UNKNOWN = -1
"""Group code of a value that is not known: it counts in the whole and in no group."""

MAX_GROUPS = 64
"""A column with more distinct values is an id or a measurement, not a protected attribute."""

MANY_GROUPS = 20
"""With more groups than this a batch of usual size holds a few pairs of each."""

TINY_GROUP_ROWS = 10
"""Of fewer rows a rate moves by more than 0.1 with each of them."""

OTHERS = "*"
"""After the labels that a user lists: any other value is unknown."""

# What pandas takes for missing, and the word unknown; in any case.
_MISSING = {
    *("", "#n/a", "#n/a n/a", "#na", "<na>", "n/a", "na", "nan", "-nan", "none", "null", "unknown"),
    *("-1.#ind", "-1.#qnan", "1.#ind", "1.#qnan"),
}
# pandas writes an integer column that has gaps as "1.0": still a whole number. "007" is a name.
_WHOLE = re.compile(r"([+-]?)(0|[1-9][0-9]*)(?:\.0*)?")
_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf)", re.IGNORECASE)
_INTEGER = re.compile(r"[+-]?[0-9]+")
_ZEROS_FIRST = re.compile(r"[+-]?0[0-9]+")
# The spellings of a truth value that pandas knows, and what it writes.
_BOOLEANS = {
    spell(name): name for name in ("True", "False") for spell in (str.upper, str.lower, str)
}
# Zeros before the number included; int by itself refuses a few thousand digits.
MAX_ID_CHARACTERS = 100


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
        if name in self.columns:
            return self.columns[name]
        if len(alike := [there for there in self.columns if there.strip() == name]) == 1:
            return self.columns[alike[0]]
        there = ", ".join(map(repr, self.columns))
        hint = _separator_hint(list(self.columns), name)
        raise ValueError(f"{self.path}: no column {name!r}; the columns are {there}{hint}")


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
    text as it stands in the file, without the white space around it, a missing one being "".

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
        # Of how pandas reads; in training open_clip's own reading says the same.
        for kind in (pd.errors.ParserWarning, pd.errors.DtypeWarning):
            warnings.simplefilter("ignore", kind)
        try:
            header = pd.read_csv(path, sep=separator, nrows=0).columns
            as_text = {name: str for name in header if name not in as_open_clip}
            frame = pd.read_csv(path, sep=separator, dtype=as_text)
        except pd.errors.EmptyDataError:
            raise ValueError(f"{path}: expected a header and rows, got an empty file") from None
        except Exception as error:  # whatever decompressors and servers raise
            what = _unreadable(error, separator)
            raise ValueError(f"{path}: cannot read the table: {what}") from error
    if not len(frame):
        raise ValueError(f"{path}: expected rows below the header, got the header alone")
    # Where rows are longer than the header, pandas takes their first cells for names of rows.
    has_row_names = bool(frame.index[0] != 0 or frame.index[-1] != len(frame) - 1)
    if has_row_names and frame.iloc[:, -1].isna().all():
        raise ValueError(
            f"{path}: the rows have more cells than the header, the last of them empty, which "
            f"moves every cell by a column for open_clip; take the {separator!r} off the rows' ends"
        )
    columns = {
        name: ["" if cell != cell else cell.strip() for cell in frame[name].tolist()]
        if name in as_text
        else list(map(str, frame[name].tolist()))
        for name in header
    }
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


def check_images(table: Table, column: str) -> list[str]:
    """Return the image files of a table; a ValueError names the first that is not there."""
    files = table.column(column)
    for row, file in enumerate(files, start=1):
        if os.path.isfile(file):
            continue
        where = f"{table.path}: row {row}"
        if os.path.isfile(file.strip()):
            raise ValueError(
                f"{where}: white space around the image file {file!r}, which is a part of its name "
                "for open_clip; take it off"
            )
        why = [] if os.path.isabs(file) else ["paths are relative to the working directory"]
        if is_missing(file):
            why = ["the cell is empty or a missing mark such as NA"]
        elif _WHOLE.fullmatch(file):
            why.append("open_clip reads a column of numbers as numbers: 000000 as 0")
        if table.has_row_names:
            why.append("the rows have more cells than the header, and open_clip skips the first")
        reasons = f" ({'; '.join(why)})" if why else ""
        raise ValueError(f"{where}: no image file {file!r}{reasons}")
    return files


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
    given: Mapping[str, tuple[str, ...]] | None = None,
    others_unknown: Collection[str] = (),
) -> tuple[IntArray, CodeBook]:
    """Turn C columns of a table of N rows into group codes, int64 (N, C), and their code book.

    A column of whole numbers gets its labels in numerical order, any other in the order of the
    strings; a label's position is its code. "1.0" is the label 1, as pandas writes it where cells
    are missing, "TRUE" and "true" are True, and "007" is not 7. What pandas takes for missing (an
    empty cell, NA, #N/A, <NA>, NaN, None, null, ...), the word unknown (all in any case) and, where
    it is no label, -1 are `UNKNOWN`. `codebook` has labels decided earlier, which this table must
    keep to (None: it decides); `given` the labels of some attributes, `others_unknown` the
    attributes of which any other value is unknown.

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
            labels[name] = (given or {}).get(name) or attribute_labels(cells, where)
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
    elif distinct <= _BOOLEANS.keys():
        labels = tuple(sorted(set(map(_canonical, distinct))))
    elif all(_NUMBER.fullmatch(v) and not _ZEROS_FIRST.fullmatch(v) for v in distinct):
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
    expected = "expected labels separated by commas"
    # -1 is unknown where nothing is said of it; as a label it is a group like any other.
    missing = [label for label in labels if is_missing(label) and label != str(UNKNOWN)]
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


def given_attributes(
    items: Iterable[str], flag: str
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Take attributes apart that are given as NAME or NAME=LABEL,...[,*].

    Returns the names, the labels of those that have some, and the names whose labels end in ``*``.

    Raises:
        ValueError: labels that `given_labels` refuses; the message begins with the flag.
    """
    named = [item.partition("=") for item in items]
    found = {
        name: given_labels(text, f"{flag} {name}={text}") for name, sign, text in named if sign
    }
    labels = {name: of_one for name, (of_one, _) in found.items()}
    others_unknown = tuple(name for name, (_, others) in found.items() if others)
    return tuple(name for name, _, _ in named), labels, others_unknown


def lone_group(
    attribute: str, labels: Sequence[str], codes: IntArray, cells: Iterable[str] = ()
) -> str | None:
    """Say that one known group alone is left of an attribute, where that is so.

    Where -1 is among the cells that were coded, how to make it a label is said, too.
    """
    counts = np.bincount(codes[codes >= 0], minlength=len(labels))
    if np.count_nonzero(counts) != 1:
        return None
    group, unknown = int(counts.argmax()), len(codes) - int(counts.sum())
    way = f"; where -1 is a group, give the labels: {attribute}=-1,{labels[group]}"
    return (
        f"attribute {attribute!r}: one known group alone, {labels[group]!r} ({counts[group]} of "
        f"{len(codes)} rows, {unknown} unknown): there is no gap between groups"
        f"{way if str(UNKNOWN) in set(map(_canonical, cells)) else ''}"
    )


def group_remark(
    attribute: str,
    labels: Sequence[str],
    codes: IntArray,
    cells: Iterable[str],
    *,
    tiny: int = TINY_GROUP_ROWS,
) -> str | None:
    """Say that an attribute's groups are one alone, many, or of fewer than ``tiny`` rows."""
    counts = np.bincount(codes[codes >= 0], minlength=len(labels))
    lone = lone_group(attribute, labels, codes, cells)
    if lone or (len(labels) <= MANY_GROUPS and counts.min() >= tiny):
        return lone
    order = np.argsort(counts, kind="stable")
    shown = ", ".join(f"{labels[group]!r} {counts[group]}" for group in order[:8])
    what = "some too small to be compared" if counts.min() < tiny else "more than a batch can hold"
    return (
        f"attribute {attribute!r}: {len(labels)} groups in {len(codes)} rows, {what} "
        f"({shown}{', ...' * (len(labels) > 8)}); bin or merge them"
    )


def group_remarks(table: Table, codes: IntArray, codebook: CodeBook) -> tuple[str, ...]:
    """Return `group_remark` of each attribute of a table of which there is one."""
    said = (
        group_remark(name, labels, column, table.column(name))
        for (name, labels), column in zip(codebook.labels.items(), codes.T, strict=True)
    )
    return tuple(filter(None, said))


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
    """Write a whole number and a truth value in one way ("+1" and "1.0" are "1")."""
    match = _WHOLE.fullmatch(value)  # not by int, which refuses a few thousand digits
    if match is None:
        return _BOOLEANS.get(value, value)
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
