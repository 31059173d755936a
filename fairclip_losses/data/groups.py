"""What the cells of a column mean: group codes, class codes, and what is to be said of groups.

One rule for tables and shards alike, `GroupCoder`: labels are numbered by their position.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from .tables import IntArray, Table, write_text

UNKNOWN = -1  # group code of a value that is not known: it counts in the whole and in no group
MAX_GROUPS = 64  # with more distinct values a column is an id or a measurement, no attribute
MANY_GROUPS = 20  # with more of them a batch of usual size holds a few pairs of each
TINY_GROUP_ROWS = 10  # with fewer rows a rate moves by more than 0.1 with each of them
OTHERS = "*"  # after the labels that a user lists: any other value is unknown

# What pandas takes for missing, and the word unknown; in any case.
_MISSING = {
    *("", "#n/a", "#n/a n/a", "#na", "<na>", "n/a", "na", "nan", "-nan", "none", "null", "unknown"),
    *("-1.#ind", "-1.#qnan", "1.#ind", "1.#qnan"),
}
# pandas writes an integer column that has gaps as "1.0": still a whole number. "007" is a name.
_WHOLE = re.compile(r"([+-]?)(0|[1-9][0-9]*)(?:\.0*)?")
_NUMBER = re.compile(
    r"(?![+-]?0[0-9]+\Z)[+-]?((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf)", re.IGNORECASE
)
# The spellings of a truth value that pandas knows, and what it writes.
_BOOLEANS = {
    spell(name): name for name in ("True", "False") for spell in (str.upper, str.lower, str)
}


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


class GroupCoder:
    """An attribute's values as codes: a label's position, and `UNKNOWN` for a missing value.

    Any other value is refused, or, with ``others_unknown``, unknown too. ``expected`` is what to
    say of one that is refused.
    """

    def __init__(self, labels: Sequence[str], *, others_unknown: bool = False) -> None:
        self.labels = labels
        self.expected = f"expected one of {shortened(labels)}"
        self._others = UNKNOWN if others_unknown else None
        self._codes = {label: position for position, label in enumerate(labels)}

    def code(self, value: str | None) -> int | None:
        """Return a value's code, None where it is refused; None stands for what is no value."""
        if value is None:
            return self._others
        default = UNKNOWN if is_missing(value) else self._others
        return self._codes.get(value, self._codes.get(_canonical(value), default))

    def encode(self, cells: Sequence[str], where: str) -> IntArray:
        """Return each cell's code, int64 (N,); a ValueError says which cells are refused."""
        codes = {cell: self.code(cell) for cell in set(cells)}
        if refused := Counter(cell for cell in cells if codes[cell] is None):
            value, count = refused.most_common(1)[0]
            times = f"{count} row{'s' * (count > 1)}, first in row {cells.index(value) + 1}"
            raise ValueError(f"{where}: {self.expected}, got {value!r} in {times}")
        return np.array([codes[cell] for cell in cells], dtype=np.int64)


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
    columns: list[IntArray] = []
    labels: dict[str, tuple[str, ...]] = {}
    for name in names:
        cells = table.column(name)
        where = f"{table.path}: attribute column {name!r}"
        if codebook is None:
            labels[name] = (given or {}).get(name) or attribute_labels(cells, where)
        elif name in codebook.labels:
            labels[name] = codebook.labels[name]
        else:
            raise ValueError(f"{where}: the code book holds only {sorted(codebook.labels)}")
        coder = GroupCoder(labels[name], others_unknown=name in others_unknown)
        columns.append(coder.encode(cells, where))
        if (columns[-1] == UNKNOWN).all():
            raise ValueError(f"{where}: expected groups, got no known value in {len(cells)} rows")
    return np.stack(columns, axis=1), CodeBook(labels)


def encode_labels(table: Table, column: str, num_classes: int) -> tuple[IntArray, tuple[str, ...]]:
    """Turn a column into class codes 0..K-1, int64 (N,), K = num_classes, and the K class names.

    Whole numbers that already lie in 0..K-1 are taken as they are, even where a class does not
    occur. Any others are numbered by their order, numerical or alphabetical; -1 is one of them.

    Raises:
        ValueError: no such column, a missing label, a number with a fraction, or a number of
            distinct values that is not K.
    """
    if num_classes < 2:
        raise ValueError(f"expected at least 2 classes, got {num_classes}")
    cells = table.column(column)
    where = f"{table.path}: label column {column!r}"
    for row, cell in enumerate(cells, start=1):
        if is_missing(cell, unknown=None):
            raise ValueError(f"{where}: expected a label in every row, got {cell!r} in row {row}")
    labels = attribute_labels(cells, where, limit=None, unknown=None)
    classes = tuple(map(str, range(num_classes)))
    if set(labels) <= set(classes):
        labels = classes
    if len(labels) != num_classes:
        got = f"got {len(labels)} distinct values: {shortened(labels)}"
        raise ValueError(f"{where}: expected {num_classes} classes, {got}")
    return GroupCoder(labels).encode(cells, where), labels


def attribute_labels(
    cells: Iterable[str],
    where: str,
    limit: int | None = MAX_GROUPS,
    unknown: int | None = UNKNOWN,
) -> tuple[str, ...]:
    """Return a column's labels in order: numerical if all are whole numbers, else by string."""
    distinct = {cell for cell in cells if not is_missing(cell, unknown)}
    are_whole = all(map(_WHOLE.fullmatch, distinct))
    if are_whole or distinct <= _BOOLEANS.keys():
        distinct = set(map(_canonical, distinct))
    elif all(map(_NUMBER.fullmatch, distinct)):
        got = f"got the number {min(v for v in distinct if not _WHOLE.fullmatch(v))}"
        raise ValueError(f"{where}: expected whole numbers or names, {got}; bin it first")
    labels = tuple(sorted(distinct, key=Decimal if are_whole else None))
    if limit is not None and len(labels) > limit:
        got = f"got {len(labels)} distinct values: an id, or a measurement to be binned first"
        raise ValueError(f"{where}: expected at most {limit} groups, {got} ({shortened(labels)})")
    return labels


def given_attributes(
    items: Iterable[str], flag: str
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Take attributes apart that are given as NAME or NAME=LABEL,...[,*].

    Returns the names, the labels of those that have some, in the order of their codes, and the
    names whose labels end in ``*``: any other value is unknown.

    Raises:
        ValueError: no label, one twice, a mark of the unknown among them, or too many; the message
            begins with the flag.
    """
    named = [item.partition("=") for item in items]
    labels: dict[str, tuple[str, ...]] = {}
    others_unknown: list[str] = []
    for name, text in [(name, text) for name, sign, text in named if sign]:
        values = [value.strip() for value in text.split(",")]
        if values[-1] == OTHERS:
            others_unknown.append(name)
            values.pop()
        labels[name] = given = tuple(map(_canonical, values))
        expected = f"{flag} {name}={text}: expected"
        # -1 is unknown where nothing is said of it; as a label it is a group like any other.
        missing = [label for label in given if is_missing(label) and label != str(UNKNOWN)]
        if not given or OTHERS in given:
            after = f"and {OTHERS} (any other value is unknown) after the last of them alone"
            raise ValueError(f"{expected} labels separated by commas, {after}")
        if missing:
            got = f"got {missing[0]!r}, which stands for an unknown value"
            raise ValueError(f"{expected} labels separated by commas, {got}")
        if len(set(given)) != len(given) or len(given) > MAX_GROUPS:
            got = f"got {len(given)} labels"
            raise ValueError(f"{expected} each label once and at most {MAX_GROUPS}, {got}")
    return tuple(name for name, _, _ in named), labels, tuple(others_unknown)


def group_remark(
    attribute: str,
    labels: Sequence[str],
    codes: IntArray,
    cells: Iterable[str] = (),
    *,
    tiny: int = TINY_GROUP_ROWS,
    many: float = MANY_GROUPS,
) -> str | None:
    """Say that an attribute's groups are one alone, over ``many``, or of fewer than ``tiny`` rows.

    Where -1 is among the cells of one alone, how to make it a label is said, too.
    """
    counts = np.bincount(codes[codes >= 0], minlength=len(labels))
    if np.count_nonzero(counts) == 1:
        group, unknown = int(counts.argmax()), len(codes) - int(counts.sum())
        way = f"; where -1 is a group, give the labels: {attribute}=-1,{labels[group]}"
        return (
            f"attribute {attribute!r}: one known group alone, {labels[group]!r} ({counts[group]} "
            f"of {len(codes)} rows, {unknown} unknown): there is no gap between groups"
            f"{way if str(UNKNOWN) in set(map(_canonical, cells)) else ''}"
        )
    if len(labels) <= many and counts.min(initial=tiny) >= tiny:
        return None
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


def _canonical(value: str) -> str:
    """Write a whole number and a truth value in one way ("+1" and "1.0" are "1")."""
    match = _WHOLE.fullmatch(value)  # not by int, which refuses a few thousand digits
    if match is None:
        return _BOOLEANS.get(value, value)
    return match[2] if match[1] != "-" or match[2] == "0" else f"-{match[2]}"


def is_missing(value: str, unknown: int | None = UNKNOWN) -> bool:
    """Whether a cell says that its value is not known: empty, NA, NaN, None, unknown, -1, ..."""
    return value.lower() in _MISSING or _canonical(value) == str(unknown)


def shortened(labels: Sequence[str]) -> str:
    """Return the first labels for a message."""
    return ", ".join(map(repr, labels[:8])) + (", ..." if len(labels) > 8 else "")
