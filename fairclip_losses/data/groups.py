"""What a protected attribute's values mean: labels, their codes, and the code book of a run.

attribute_labels (learnt) or given_labels (listed) -> GroupCoder -> codes; CodeBook keeps them
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import numpy.typing as npt

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
        write_text(path, json.dumps(self.labels, indent=2) + "\n")


def attribute_labels(
    cells: Iterable[str], where: str, limit: int | None = MAX_GROUPS
) -> tuple[str, ...]:
    """Return a column's labels in order: numerical if all are whole numbers, else by string.

    Refused are numbers with fractions, and more than ``limit`` labels.
    """
    distinct = {cell for cell in cells if not is_missing(cell)}
    if all(_WHOLE.fullmatch(value) for value in distinct):
        labels = tuple(sorted(set(map(_canonical, distinct)), key=Decimal))
    elif all(_NUMBER.fullmatch(value) for value in distinct):
        example = min(value for value in distinct if not _WHOLE.fullmatch(value))
        raise ValueError(
            f"{where}: expected whole numbers or names, got the number {example}; bin it first"
        )
    else:
        labels = tuple(sorted(distinct))
    if limit is not None and len(labels) > limit:
        raise ValueError(
            f"{where}: expected at most {limit} groups, got {len(labels)} distinct values: "
            f"an id, or a measurement to be binned first ({shortened(labels)})"
        )
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
    if not labels or OTHERS in labels:
        raise ValueError(
            f"{where}: expected labels separated by commas, and {OTHERS} (any other value is "
            "unknown) after the last of them alone"
        )
    missing = [label for label in labels if is_missing(label)]
    if missing:
        raise ValueError(
            f"{where}: expected labels separated by commas, got {missing[0]!r}, which stands for "
            "an unknown value"
        )
    if len(set(labels)) != len(labels) or len(labels) > MAX_GROUPS:
        raise ValueError(
            f"{where}: expected each label once and at most {MAX_GROUPS}, got {len(labels)} labels"
        )
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
        if value is not None:
            code = self._codes.get(value, self._codes.get(_canonical(value)))
            if code is not None or is_missing(value):
                return UNKNOWN if code is None else code
        return UNKNOWN if self.others_unknown else None

    def encode(self, cells: Sequence[str], where: str) -> IntArray:
        """Return each cell's code, int64 (N,); a ValueError says which cells are refused."""
        by_cell = {cell: self.code(cell) for cell in set(cells)}
        refused = Counter(cell for cell in cells if by_cell[cell] is None)
        if refused:
            value, count = refused.most_common(1)[0]
            raise ValueError(
                f"{where}: {self.expected}, got {value!r} in {count} row{'s' * (count > 1)}, "
                f"first in row {cells.index(value) + 1}"
            )
        return np.array([by_cell[cell] for cell in cells], dtype=np.int64)

    @property
    def expected(self) -> str:
        """What to say of a value that is refused."""
        return f"expected one of {shortened(self.labels)}"


def _canonical(value: str) -> str:
    """Write a whole number in one way ("+1", "01" and "1.0" are "1"); leave the rest alone."""
    match = _WHOLE.fullmatch(value)
    if match is None:
        return value
    sign = "-" if match[1] == "-" and match[2] != "0" else ""
    return sign + match[2]  # not by int, which refuses a few thousand digits


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
