"""Shards before training: their names, and what a reading of their json members finds."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ...data.groups import MAX_GROUPS, GroupCoder, IntArray, is_missing
from ...errors import one_line
from .shard_samples import cell, hashed_id, members, own_id, plain, refusal

# The host's reader passes over such members.
_META = re.compile(r"__[^/]*__($|/)")


def local_path(url: str) -> str | None:
    """Return the path of a shard that is a file of this machine, None for any other."""
    if url.startswith("pipe:"):
        return None
    scheme = urlsplit(url).scheme
    if scheme == "file":
        return urlsplit(url).path
    return url if not scheme else None


def shard_names(urls: Iterable[str]) -> dict[str, str]:
    """Return url -> name: as many of the last parts of its path as tell all shards apart.

    So the ids stay the same where a data set is moved as a whole. Two urls that differ in nothing
    but a query (``?...``) keep their whole text.
    """
    parts = {url: url.partition("?")[0].split("/") for url in dict.fromkeys(urls)}
    for depth in range(1, max(map(len, parts.values())) + 1):
        names = {url: "/".join(part[-depth:]) for url, part in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {url: url for url in parts}


@dataclass
class ShardReading:
    """What was found in one shard or, merged, in several."""

    shards: int = 1
    pairs: int = 0
    with_json: int = 0
    undecoded: int = 0  # samples that are no pairs, for their json member cannot be read
    bad_ids: int = 0
    keys: Counter[str] = field(default_factory=Counter)  # of json members, at a first look
    values: dict[str, set[str]] = field(default_factory=dict)  # by attribute
    ids: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    refused: list[str] = field(default_factory=list)  # the first value that is no group, by shard
    unreadable: list[str] = field(default_factory=list)  # why, by shard

    def twice(self) -> IntArray:
        """Return the ids that more than one pair has."""
        ids, counts = np.unique(self.ids, return_counts=True)
        repeated: IntArray = ids[counts > 1]
        return repeated

    @classmethod
    def merged(cls, readings: Sequence[ShardReading]) -> ShardReading:
        """Return the findings of several readings together."""
        names = dict.fromkeys(name for reading in readings for name in reading.values)
        return cls(
            shards=sum(reading.shards for reading in readings),
            pairs=sum(reading.pairs for reading in readings),
            with_json=sum(reading.with_json for reading in readings),
            undecoded=sum(reading.undecoded for reading in readings),
            bad_ids=sum(reading.bad_ids for reading in readings),
            keys=sum((reading.keys for reading in readings), Counter()),
            values={
                name: set().union(*(reading.values.get(name, ()) for reading in readings))
                for name in names
            },
            ids=np.concatenate([np.empty(0, np.int64), *(reading.ids for reading in readings)]),
            refused=[what for reading in readings for what in reading.refused],
            unreadable=[why for reading in readings for why in reading.unreadable],
        )


@dataclass(frozen=True)
class ShardReader(Dataset[ShardReading]):
    """Reads the json members of shards; item k is shard k's `ShardReading`.

    Of a file on this machine only the headers and the json members are read, so the images cost
    nothing. Members are grouped into samples, and samples without an image or a caption left out,
    by the host's own functions.
    """

    urls: Sequence[str]
    names: Mapping[str, str]
    coders: Mapping[str, GroupCoder | None]  # by attribute; None: its labels are to be read
    id_key: str | None
    limit: int | None = None  # pairs of each shard

    def __len__(self) -> int:
        return len(self.urls)

    def __getitem__(self, index: int) -> ShardReading:
        url = self.urls[index]
        reading = ShardReading(values={name: set() for name in self.coders})
        ids: list[int] = []
        try:
            with contextlib.closing(_samples(url)) as samples:
                for sample in samples:
                    self._enter(sample, self.names[url], reading, ids)
                    if reading.pairs == self.limit:
                        break
        except (OSError, tarfile.TarError) as error:
            reading.unreadable.append(f"{url}: {one_line(error).removeprefix(f'{url}: ')}")
        reading.ids = np.array(ids, dtype=np.int64)
        return reading

    def read(self, workers: int = 0) -> ShardReading:
        """Read all shards, with as many processes as the host's loader has, or in this one."""
        loader: DataLoader[Any] = DataLoader(
            self,
            batch_size=None,
            num_workers=min(workers, len(self)),
            generator=torch.Generator(),  # training draws the numbers that it would without
        )
        return ShardReading.merged(list(loader))

    def _enter(
        self, sample: dict[str, Any], name: str, reading: ShardReading, ids: list[int]
    ) -> None:
        if "json" in sample:
            try:
                sample["json"] = json.loads(sample["json"])
            except (ValueError, RecursionError):
                reading.undecoded += 1  # the host leaves such a sample out, too
                return
        reading.pairs += 1
        found = members(sample)
        reading.with_json += found is not None
        if self.limit is not None:  # a first look, to say what is there where a key is not
            reading.keys.update(map(str, found or ()))
        if self.id_key is None:
            ids.append(hashed_id(name, str(sample["__key__"])))
        elif found is not None and self.id_key in found:
            identity = own_id(found[self.id_key])
            reading.bad_ids += identity is None
            ids.extend(() if identity is None else (identity,))
        for attribute, coder in self.coders.items():
            value = (found or {}).get(attribute)
            label = cell(value)
            refused = label is None if coder is None else coder.code(label) is None
            if refused and not reading.refused:
                key = plain(str(sample["__key__"]))
                reading.refused.append(refusal(name, key, attribute, value, coder))
            values = reading.values[attribute]
            # More values than there may be groups are refused; which ones is all the same then.
            if label is not None and not is_missing(label) and len(values) <= MAX_GROUPS:
                values.add(label)


def _samples(url: str) -> Generator[dict[str, Any], None, None]:
    """Yield the host's samples of a shard, with the bytes of their json member alone."""
    from open_clip_train import data as host

    for sample in host.group_by_keys_nothrow(_members(url)):
        if host.filter_no_caption_or_no_image(sample):
            yield sample


def _members(url: str) -> Generator[dict[str, Any], None, None]:
    path = local_path(url)
    with contextlib.ExitStack() as stack:
        tar: Any
        if path is not None:
            tar = stack.enter_context(tarfile.open(path, "r:*"))
        else:
            from webdataset.gopen import gopen

            try:
                stream = gopen(url)
            except ValueError as error:
                what = "webdataset knows no such scheme"
                raise OSError(errno.EPROTONOSUPPORT, what, url) from error
            # A command that is told to stop in the middle ends badly, and that is all right.
            stack.push(lambda *_: _close_quietly(stream))
            tar = stack.enter_context(tarfile.open(fileobj=stream, mode="r|*"))
        for member in iter(tar.next, None):
            tar.members.clear()  # or the headers of a whole shard pile up
            if not member.isreg() or _META.match(member.name):
                continue
            file = tar.extractfile(member) if member.name.lower().endswith(".json") else None
            content = b"" if file is None else file.read()
            yield {"fname": member.name, "data": content, "__url__": url}


def _close_quietly(stream: Any) -> None:
    with contextlib.suppress(OSError):
        stream.close()


def missing_files(urls: Iterable[str]) -> list[str]:
    """Return the shards that should be files of this machine and are not."""
    return [
        url for url in urls if (path := local_path(url)) is not None and not os.path.isfile(path)
    ]
