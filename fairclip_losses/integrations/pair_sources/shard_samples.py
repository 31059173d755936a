"""A webdataset sample's id and group codes, read off its json member in the loader's workers.

An id is the sample's own (``--fair-id-key``), or the 64-bit BLAKE2b hash of its key and its shard's
name: the same in every process, run and machine. Among n pairs two hashes collide with probability
about n^2 / 2^65: 3e-8 for 1e6 pairs, 3e-4 for 1e8. Pairs that share an id share their history.

What a sample lacks travels as a code of its own (`NO_JSON` and the like), so that the workers'
findings add up in the training process whatever their number.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from ...data import UNKNOWN
from ...data.groups import GroupCoder

NO_JSON, NO_KEY = -2, -3
"""Codes of a group that is unknown because the json member or its key is missing."""

ID, SHARD, UNNAMED, GROUPS = 0, 1, 2, 3
"""Columns of a sample's row: id, shard number, whether the id asked for is missing, codes."""

FIELDS = ("fair_row", "fair_key")
"""Names under which a sample carries its row and its key."""

_DECIMAL = re.compile(r"0|-?[1-9][0-9]{0,18}")


def hashed_id(*parts: str) -> int:
    """Return the 64-bit BLAKE2b hash of strings as a signed integer."""
    digest = blake2b("\0".join(map(plain, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def plain(text: str) -> str:
    """Return text that UTF-8 can hold; names in a tar file and json strings need not be."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def own_id(value: object) -> int | None:
    """Return the id that a json value stands for, None for a value that is no id.

    Whole numbers of 64 bits are themselves, also as the strings that they are written as; other
    strings are hashed: a hexadecimal uid, and "007", which is not the id 7. White space around a
    string is no part of it.
    """
    if isinstance(value, str) and value.strip():
        text = value.strip()
        number = int(text) if _DECIMAL.fullmatch(text) else None
        return number if number is not None and -(2**63) <= number < 2**63 else hashed_id(text)
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return value
    return None


def cell(value: object) -> str | None:
    """Return a json value as a table would hold it, None for a list or an object."""
    if value is None:
        return ""
    return plain(str(value)).strip() if isinstance(value, (str, int, float)) else None


def members(sample: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return a decoded sample's json object, None where it has none."""
    found = sample.get("json")
    return found if isinstance(found, Mapping) else None


def refusal(shard: str, key: str, name: str, value: object, coder: GroupCoder | None) -> str:
    """Say where a value is that is no group and not missing; no coder: any name is a group."""
    expected = "expected a string or a number" if coder is None else coder.expected
    return (
        f"shard {shard}, sample {key}: key {name!r} of the json member: {expected}, "
        f"got {reprlib.repr(value)}"
    )


class PairStage:
    """A stage of the host's pipeline that puts each sample's row and key beside its members.

    Args:
        shards: url -> its number and name.
        coders: by key of the json member, in the order of the codes.
        id_key: key of the json member that holds the id, or None.
    """

    def __init__(
        self,
        shards: Mapping[str, tuple[int, str]],
        coders: Mapping[str, GroupCoder],
        id_key: str | None,
    ) -> None:
        self.shards = shards
        self.coders = coders
        self.id_key = id_key

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Pass the samples on, each with the fields `FIELDS`."""
        for sample in samples:
            key = str(sample["__key__"])
            sample[FIELDS[0]] = self.row(sample, key)
            sample[FIELDS[1]] = plain(key)
            yield sample

    def row(self, sample: Mapping[str, Any], key: str) -> Tensor:
        """Return the sample's row, int64 (3 + C,).

        Raises:
            ValueError: a value that is no group and not missing; the message says where.
        """
        number, shard = self.shards[sample["__url__"]]
        found = members(sample)
        identity = None
        if self.id_key is not None and found is not None:
            identity = own_id(found.get(self.id_key))
        unnamed = self.id_key is not None and identity is None
        if identity is None:
            identity = hashed_id(shard, key)
        codes = [NO_JSON if found is None else NO_KEY] * len(self.coders)
        for position, (name, coder) in enumerate(self.coders.items()):
            if found is not None and name in found:
                code = coder.code(cell(found[name]))
                if code is None:
                    raise ValueError(refusal(shard, plain(key), name, found[name], coder))
                codes[position] = code
        return torch.tensor([identity, number, unnamed, *codes], dtype=torch.int64)


def groups_of(rows: Tensor) -> Tensor:
    """Return the group codes (B, C) of rows, whatever is missing being unknown."""
    return rows[:, GROUPS:].clamp(min=UNKNOWN)


def count_lacks(rows: Tensor) -> Tensor:
    """Count a batch's samples without json or key: (2, 1 + C), the id's first."""
    codes = rows[:, GROUPS:]
    unnamed = rows[:, UNNAMED] != 0
    without = (codes == NO_JSON).any(dim=1) if codes.shape[1] else torch.zeros_like(unnamed)
    named = torch.stack([torch.zeros_like(unnamed), unnamed & ~without])
    missing = torch.stack([codes == mark for mark in (NO_JSON, NO_KEY)])
    return torch.cat([named[:, :, None], missing], dim=2).sum(dim=1)
