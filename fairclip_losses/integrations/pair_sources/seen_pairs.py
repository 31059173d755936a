"""What a process remembers of the streamed pairs of one epoch: where they are and their groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ...data.groups import IntArray
from .shard_samples import ID, SHARD, groups_of


@dataclass(frozen=True)
class PairPlaces:
    """Ids in ascending order, each once, and beside them shard numbers, keys and group codes."""

    ids: IntArray  # (N,)
    shards: npt.NDArray[np.int32]  # (N,)
    keys: list[str]  # N
    codes: npt.NDArray[np.int8]  # (N, C)

    @classmethod
    def merged(cls, parts: Sequence[PairPlaces]) -> PairPlaces:
        """Return the pairs of several processes together."""
        ids = np.concatenate([part.ids for part in parts])
        keys = [key for part in parts for key in part.keys]
        ids, first = np.unique(ids, return_index=True)
        return cls(
            ids,
            np.concatenate([part.shards for part in parts])[first],
            [keys[k] for k in first],
            np.concatenate([part.codes for part in parts])[first],
        )

    def rows_of(self, ids: IntArray) -> IntArray:
        """Return the row of each id, -1 where it is not here."""
        if not len(self.ids):
            return np.full(len(ids), -1)
        rows = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        return np.where(self.ids[rows] == ids, rows, -1)


class SeenPairs:
    """The pairs of the running epoch, 12 bytes each, the key and a byte for each attribute."""

    def __init__(self, attributes: int) -> None:
        self.attributes = attributes
        self.clear()

    def clear(self) -> None:
        """Forget the epoch."""
        self._ids = [np.empty(0, dtype=np.int64)]
        self._shards = [np.empty(0, dtype=np.int32)]
        self._codes = [np.empty((0, self.attributes), dtype=np.int8)]
        self._keys = [b""]  # of each batch, with a zero byte between two

    def add(self, rows: Tensor, keys: Sequence[str]) -> None:
        """Remember a batch by its rows and keys (copies: the loader's memory is shared)."""
        self._ids.append(rows[:, ID].numpy().copy())
        self._shards.append(rows[:, SHARD].numpy().astype(np.int32))
        self._codes.append(groups_of(rows).numpy().astype(np.int8))
        self._keys.append("\0".join(keys).encode())

    def codes(self) -> tuple[IntArray, npt.NDArray[np.int8]]:
        """Return the ids, each once, and their group codes."""
        ids, first = np.unique(np.concatenate(self._ids), return_index=True)
        return ids, np.concatenate(self._codes)[first]

    def shared_id(self) -> tuple[int, int, str, int, str] | None:
        """Return an id under which two pairs have come, and shard and key of the two."""
        ids, shards = np.concatenate(self._ids), np.concatenate(self._shards)
        order = np.argsort(ids, kind="stable")
        again = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
        first, second = order[again], order[again + 1]
        keys = [self._keys_at(first), self._keys_at(second)]
        for one, other, key, other_key in zip(first, second, *keys, strict=True):
            if shards[one] != shards[other] or key != other_key:
                return int(ids[one]), int(shards[one]), key, int(shards[other]), other_key
        return None

    def places(self, wanted: IntArray | None) -> PairPlaces:
        """Return what is known of the pairs wanted, None being all."""
        ids = np.concatenate(self._ids)
        chosen = np.arange(len(ids)) if wanted is None else np.flatnonzero(np.isin(ids, wanted))
        ids, first = np.unique(ids[chosen], return_index=True)
        chosen = chosen[first]
        return PairPlaces(
            ids,
            np.concatenate(self._shards)[chosen],
            self._keys_at(chosen),
            np.concatenate(self._codes)[chosen],
        )

    def _keys_at(self, positions: IntArray) -> list[str]:
        """Return the keys at positions in the epoch; only the batches of these are unpacked."""
        starts = np.cumsum([0, *map(len, self._ids)])
        batches = np.searchsorted(starts, positions, side="right") - 1
        keys = [""] * len(positions)
        order = np.argsort(batches, kind="stable")
        unpacked, content = -1, [""]
        for k in order:
            if batches[k] != unpacked:
                unpacked = batches[k]
                content = self._keys[unpacked].decode().split("\0")
            keys[k] = content[positions[k] - starts[unpacked]]
        return keys
