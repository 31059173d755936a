"""Pairs streamed from webdataset shards, with ids and groups from each sample's json member.

An id is the sample's own (``--fair-id-key``), or the 64-bit BLAKE2b hash of its key and its shard's
name: the same in every process, run and machine. Among n pairs two hashes collide with probability
about n^2 / 2^65: 3e-8 for 1e6 pairs, 3e-4 for 1e8. Pairs that share an id share their history.

A group is one of the labels given (``--fair-attributes race=Asian,Black``) or, without labels, an
integer code as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import reprlib
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.groups import (
    MAX_GROUPS,
    UNKNOWN,
    CodeBook,
    GroupCoder,
    group_remark,
    is_missing,
    shortened,
)
from ..data.images import holds_deep_image
from ..data.tables import IntArray
from ..distributed import gather_objects
from ..errors import UsageError, one_line
from ..miners import MinerReport
from .csv_pairs import PREFIX, PairBatch, PairSource, process_count
from .flags import FairOptions
from .pair_reports import FlagRates, WarnOnce, attribute_column, count_flagged, flag_rates

# Columns of a sample's row: id, shard number, what it lacks, group codes. Of what it lacks bit 0 is
# the json member, bit 1 the id asked for, bit 2 + c the key of attribute c, and the next the
# caption; the bit past these says that the image has more than 8 bits.
ID, SHARD, LACKS, GROUPS = 0, 1, 2, 3

FIELDS = (f"{PREFIX}row", f"{PREFIX}key")  # names under which a sample carries its row and its key
NOTED = "__noted__"  # that of the last two bits: 1 = an empty caption, 2 = more than 8 bits
IMAGES = (".jpg", ".png", ".jpeg", ".webp")  # open_clip's

Shards = Mapping[str, tuple[int, str]]  # url -> number and name
Place = tuple[int, str, tuple[int, ...]]  # of a streamed pair: shard number, key, group codes

# A first look: enough to know a wrong key, and cheap on remote storage.
LOOK_SHARDS, LOOK_PAIRS = 3, 100

_DECIMAL = re.compile(r"0|-?[1-9][0-9]{0,18}")
_META = re.compile(r"__[^/]*__($|/)")  # webdataset passes over such members


def hashed_id(*parts: str) -> int:
    """Return the 64-bit BLAKE2b hash of strings as a signed integer."""
    digest = hashlib.blake2b("\0".join(map(_plain, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _plain(text: str) -> str:
    """Return text that UTF-8 can hold; names in a tar file and json strings need not be."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def own_id(value: object) -> int | None:
    """Return the id that a json value stands for, None for a value that is no id.

    Whole numbers of 64 bits are themselves, also as the strings that they are written as; other
    strings are hashed: a hexadecimal uid, and "007", which is not the id 7. White space around a
    string is no part of it. Marks of what is missing (NA, null, ...) are none.
    """
    if isinstance(value, str):
        text = value.strip()
        if _DECIMAL.fullmatch(text) and -(2**63) <= int(text) < 2**63:
            return int(text)
        return None if is_missing(text) else hashed_id(text)
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return value
    return None


def _cell(value: object) -> str | None:
    """Return a json value as a table would hold it, None for a list or an object."""
    if value is None:
        return ""
    return _plain(str(value)).strip() if isinstance(value, (str, int, float)) else None


class DecodeStage:
    """open_clip's stage that decodes a sample's members, and leaves out what it cannot decode.

    The line that open_clip logs of these gets their names, and a sample says if its caption is
    empty or its image deep.
    """

    def __init__(self, inner: Any, shards: Shards) -> None:
        self.inner = inner
        self.shards = shards

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Pass the decoded samples on, each with the field `NOTED`."""
        options = {**self.inner.kw, "handler": self._leave_out}
        for sample in self.inner.f(self._noted(samples), self._look, *self.inner.args, **options):
            yield {**sample, NOTED: self.noted}

    def _noted(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            self.sample, self.member, self.noted = sample, "", 0
            yield sample

    def _look(self, member: str, content: bytes) -> None:
        """Look at a member just before it is decoded."""
        self.member = member
        self.noted |= member == ".txt" and not content.strip()
        self.noted |= 2 * (member in IMAGES and holds_deep_image(content))

    def _leave_out(self, error: Exception) -> Any:
        error.args = (*error.args, f"{place(self.sample, self.shards)}, member {self.member}")
        return self.inner.kw["handler"](error)


class PairStage:
    """A stage of open_clip's pipeline that puts each sample's row and key beside its members."""

    def __init__(self, shards: Shards, options: FairOptions) -> None:
        self.shards = shards
        self.id_key = options.fair_id_key
        self.given, others = options.fair_labels, options.fair_others_unknown
        self.coders: dict[str, GroupCoder] = {}
        for name in options.fair_attributes:
            labels = self.given.get(name, codes_of(MAX_GROUPS))  # any code until `look_at`
            self.coders[name] = GroupCoder(labels, others_unknown=name in others)

    def expected(self, name: str) -> str:
        """Return what to say of a value that is no group."""
        if name in self.given:
            return self.coders[name].expected
        return (
            f"expected a code from 0 to {len(self.coders[name].labels) - 1}, or labels given as "
            f"--fair-attributes {name}=LABEL,LABEL,..."
        )

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Pass the samples on, each with the fields `FIELDS`."""
        for sample in samples:
            key = _plain(str(sample["__key__"]))
            yield {**sample, FIELDS[0]: torch.tensor(self.row(sample)), FIELDS[1]: key}

    def row(self, sample: Mapping[str, Any]) -> list[int]:
        """Return the sample's row, 3 + C integers.

        Raises:
            ValueError: a value that is no group and not missing; the message says where.
        """
        key, (number, shard) = str(sample["__key__"]), self.shards[sample["__url__"]]
        found, codes = sample.get("json"), [UNKNOWN] * len(self.coders)
        noted = sample.get(NOTED, 0) << 2 + len(codes)
        if not isinstance(found, Mapping):
            return [hashed_id(shard, key), number, 1 | noted, *codes]
        identity = None if self.id_key is None else own_id(found.get(self.id_key))
        lacks = noted | 2 * (self.id_key is not None and identity is None)
        for position, (name, coder) in enumerate(self.coders.items()):
            if name not in found:
                lacks |= 4 << position
                continue
            code = coder.code(_cell(found[name]))
            if code is None:
                raise ValueError(
                    f"{place(sample, self.shards)}: key {name!r} of the json member: "
                    f"{self.expected(name)}, got {reprlib.repr(found[name])}"
                )
            codes[position] = code
        return [hashed_id(shard, key) if identity is None else identity, number, lacks, *codes]


def codes_of(count: int) -> tuple[str, ...]:
    """Return the labels of integer codes as they are."""
    return tuple(map(str, range(count)))


def place(sample: Mapping[str, Any], shards: Shards) -> str:
    """Return where a sample comes from, in words."""
    return f"shard {shards[sample['__url__']][1]}, sample {_plain(str(sample['__key__']))}"


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


def _shard_urls(args: Any) -> list[str]:
    """Return the shards as open_clip spells them out.

    Refuses local ones that are not there, and what open_clip would refuse only after building the
    model, or wait for forever.
    """
    from open_clip_train.data import expand_urls, get_dataset_size

    try:
        urls: list[str] = expand_urls(args.train_data)[0]
    except Exception as error:  # whatever braces and environment variables may raise
        raise UsageError(f"--train-data {args.train_data!r}: {error}") from error
    remote = re.compile(r"pipe:|[a-z][a-z0-9+.-]*://")
    missing = [url for url in urls if not remote.match(url) and not os.path.isfile(url)]
    if missing:
        raise UsageError(
            f"--train-data: no shard file {missing[0]!r}; {len(missing)} of {len(urls)} are missing"
        )
    if args.train_num_samples is None:
        try:
            size, _ = get_dataset_size(args.train_data)
            wrong = "" if size else "there is no sizes.json or __len__ beside its shards"
        except Exception as error:  # a sizes.json that lacks a shard, or is none
            wrong = f"cannot read the sizes beside its shards ({error!r})"
        if wrong:
            raise UsageError(f"--train-data: {wrong}; give --train-num-samples")
    elif args.train_num_samples < 1:
        raise UsageError(f"--train-num-samples must be 1 or more, got {args.train_num_samples}")
    processes = process_count()
    if not args.dataset_resampled and len(set(urls)) < max(1, args.workers) * processes:
        raise UsageError(
            f"--workers {args.workers} x {processes} process{'es' * (processes > 1)} need as many "
            f"shards, got {len(set(urls))}; lower --workers or add --dataset-resampled"
        )
    return urls


def _first_pairs(url: str) -> Iterator[dict[str, Any]]:
    """Yield the first samples of a shard that are pairs for open_clip, their json decoded."""
    from open_clip_train import data as open_clip_data
    from webdataset.gopen import gopen

    def content(member: tarfile.TarInfo) -> bytes:
        is_text = member.name.lower().endswith((".json", ".txt"))
        file = tar.extractfile(member) if is_text else None
        return b"" if file is None else file.read()

    stream = gopen(url)
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as tar:
            named = (m for m in tar if m.isreg() and not _META.match(m.name))
            files = ({"fname": m.name, "data": content(m), "__url__": url} for m in named)
            samples = open_clip_data.group_by_keys_nothrow(files)
            pairs = filter(open_clip_data.filter_no_caption_or_no_image, samples)
            for sample in islice(pairs, LOOK_PAIRS):
                with contextlib.suppress(ValueError, RecursionError):  # left out by open_clip, too
                    yield {**sample, "json": json.loads(sample.get("json", b"null"))}
    finally:
        with contextlib.suppress(OSError):  # a command that is stopped in the middle ends badly
            stream.close()


def look_at(stage: PairStage, urls: Sequence[str], where: str) -> tuple[Tensor, tuple[str, ...]]:
    """Look at the first pairs of some shards, and tell the stage how many codes there are.

    Returns the pairs' codes, and what is to be said of groups and captions.

    Raises:
        UsageError: shards that cannot be read, keys that are not there, values that are no groups
            or ids, or an id of two pairs.
    """
    pairs: list[dict[str, Any]] = []
    unreadable = ""
    for url in urls:
        try:
            pairs += _first_pairs(url)
        except Exception as error:  # whatever webdataset raises; open_clip goes on, too
            unreadable = unreadable or f"{url}: {one_line(error).removeprefix(f'{url}: ')}"
    first = f"{where}: the first pairs of {len(urls)} shard{'s' * (len(urls) > 1)}"
    if not pairs:
        raise UsageError(
            f"--train-data: cannot read the shard {unreadable}"
            if unreadable
            else f"{first}: expected samples with a caption (txt), an image (jpg, jpeg, png or "
            "webp) and no json member that is no JSON, got none"
        )
    members = [pair["json"] for pair in pairs if isinstance(pair["json"], Mapping)]
    keys = dict.fromkeys(key for member in members for key in member)
    flags = dict.fromkeys(stage.coders, "--fair-attributes")
    for name, flag in (flags | {stage.id_key: "--fair-id-key"} if stage.id_key else flags).items():
        if name not in keys:
            lacks = f"no key {name!r}, only {', '.join(map(repr, keys))}"
            raise UsageError(f"{flag} {name}: {first} have {lacks if keys else 'no json member'}")
    try:
        rows = torch.tensor([stage.row(pair) for pair in pairs])
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
    if stage.id_key is not None:
        _check_ids(stage.id_key, members, rows[:, ID].tolist(), first)
    codes, remarks = rows[:, GROUPS:], []
    for name, of_one in zip(stage.coders, codes.T, strict=True):
        cells, count = [_cell(member.get(name)) or "" for member in members], int(of_one.max()) + 1
        known = sorted({cell for cell in cells if not is_missing(cell)})
        # That a group with labels is rare is no mistake; that no value is one of them is.
        if not count and (known or name not in stage.given):
            got = f"got {f'none, but {shortened(known)}' if known else 'no known value'}"
            raise UsageError(f"--fair-attributes {name}: {first}: {stage.expected(name)}, {got}")
        if name not in stage.given:
            stage.coders[name] = GroupCoder(codes_of(count))
        # None of a few pairs is too small.
        if remark := group_remark(name, stage.coders[name].labels, of_one.numpy(), cells, tiny=0):
            remarks.append(f"{first}: {remark}")
    empty = [pair["__key__"] for pair in pairs if not pair.get("txt", b"a").strip()]
    if empty:
        remarks.append(
            f"{first}: {len(empty)} of {len(pairs)} captions are empty (first of sample "
            f"{_plain(str(empty[0]))}) and trained so; write captions or leave the samples out"
        )
    return codes, tuple(remarks)


def _check_ids(name: str, members: Sequence[Any], ids: Sequence[int], where: str) -> None:
    where = f"--fair-id-key {name}: {where}: expected"
    if bad := sum(own_id(member[name]) is None for member in members if name in member):
        raise UsageError(f"{where} 64-bit integers or strings, got something else in {bad} of them")
    if twice := [identity for identity, count in Counter(ids).items() if count > 1]:
        some = ", ".join(map(str, twice[:3]))
        raise UsageError(f"{where} each id once, got {len(twice)} of them more than once ({some})")


def insert_stage(loader: Any, stage: PairStage) -> None:
    """Let open_clip's pipeline pass what the stage adds into the batch.

    Its stage that makes tuples of images and captions takes the fields, too, which open_clip
    collates: rows into a tensor, keys into a list. Of a batch the two are the third item.
    """
    for source in getattr(loader, "pipeline", ()):
        stages: list[Any] = getattr(getattr(source, "dataset", None), "pipeline", [])
        for position, step in enumerate(stages):
            made_by = getattr(getattr(step, "f", None), "__name__", "")
            if made_by == "_decode" and "handler" in step.kw:
                stages[position] = DecodeStage(step, stage.shards)
            if made_by == "_to_tuple" and tuple(step.args) == ("image", "text"):
                wider = type(step)(step.f, *step.args, *FIELDS, **step.kw)
                stages[position : position + 1] = [stage, wider]
                stages.append(_third_item)
                return
    raise UsageError(
        "--fair-loss: the loader of --train-data has no stage to_tuple('image', 'text') in its "
        "pipeline, which is where ids and groups join the batch; open_clip_torch 2.26.1 to 3.3.0 "
        "with webdataset 0.2.5 to 0.2.86 have it"
    )


def _third_item(batches: Iterable[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    for *pair, rows, keys in batches:
        yield (*pair, (rows, keys))


class SeenPairs:
    """The pairs of the running epoch: of each 12 bytes, the key and a byte for each attribute."""

    def __init__(self, attributes: int) -> None:
        self.count = 0
        self.lacks = torch.zeros(3 + attributes, dtype=torch.int64)  # samples, by bit of LACKS
        self._codes = np.empty((0, attributes), dtype=np.int8)
        self._batches: list[tuple[IntArray, npt.NDArray[np.int32], npt.NDArray[np.int8], str]] = []

    def add(self, rows: Tensor, keys: Sequence[str], *, keep_places: bool = True) -> None:
        """Take up a batch by its rows and keys (copies: the loader's memory is shared)."""
        self.count += len(rows)
        self.lacks += (rows[:, LACKS, None] >> torch.arange(len(self.lacks)) & 1).sum(dim=0)
        if not keep_places:
            return
        values = rows.numpy()
        ids, shards = values[:, ID].copy(), values[:, SHARD].astype(np.int32)
        self._batches.append((ids, shards, values[:, GROUPS:].astype(np.int8), "\0".join(keys)))

    def codes(self) -> tuple[IntArray, npt.NDArray[np.int8]]:
        """Return the ids, each once, and their group codes."""
        ids = np.concatenate([np.empty(0, np.int64), *(batch[0] for batch in self._batches)])
        ids, first = np.unique(ids, return_index=True)
        return ids, np.concatenate([self._codes, *(batch[2] for batch in self._batches)])[first]

    def places(self, wanted: Iterable[int] | None) -> dict[int, Place]:
        """Return id -> place of the pairs wanted, None being all."""
        chosen = None if wanted is None else set(wanted)
        places: dict[int, Place] = {}
        for ids, shards, codes, keys in self._batches:
            found = [k for k, i in enumerate(ids.tolist()) if chosen is None or i in chosen]
            split = keys.split("\0") if found else []
            for k in found:
                places[int(ids[k])] = (int(shards[k]), split[k], tuple(codes[k].tolist()))
        return places


class ShardSource(PairSource):
    """The samples of webdataset shards: ids and groups come with each from its json member.

    It remembers where the pairs of the running epoch are, so that the flagged can be found.
    """

    def __init__(self, args: Any, options: FairOptions) -> None:
        self.where, self.accum_freq = args.train_data, args.accum_freq
        names = shard_names(_shard_urls(args))
        self.names, urls = list(names.values()), list(names)
        self._stage = PairStage(dict(zip(urls, enumerate(self.names), strict=True)), options)
        places = np.linspace(0, len(urls) - 1, LOOK_SHARDS).round().astype(int)
        looked = [urls[place] for place in np.unique(places)]
        self.codes, self.remarks = look_at(self._stage, looked, self.where)
        coders = self._stage.coders.items()
        self.codebook = CodeBook({name: tuple(coder.labels) for name, coder in coders})
        # Hashes name pairs alike as long as the shards are the same; ids of their own always do.
        digest = hashlib.sha256("\n".join(sorted(self.names)).encode()).hexdigest()[:12]
        by_hash = f"{len(urls)} shards {digest}"
        self.identity = "named by their ids" if options.fair_id_key is not None else by_hash
        self._keeps_places = "dbpm" in options.fair_loss
        self._describes_all = options.fair_save_pairs
        self._places: dict[int, Place] = {}
        self._warn = WarnOnce("Fair loss")
        self._seen = SeenPairs(len(coders))

    def attach(self, loader: Any) -> None:
        """Put a stage into open_clip's pipeline."""
        if loader.num_batches < self.accum_freq:
            raise UsageError(
                f"{self.where}: an epoch has {loader.num_batches} batches, fewer than one step "
                f"takes (--accum-freq {self.accum_freq})"
            )
        insert_stage(loader, self._stage)

    def take(self, batch: Sequence[Any]) -> tuple[tuple[Any, ...], PairBatch]:
        """Take the samples' rows and keys off the batch, and count what they lack."""
        *pair, (rows, keys) = batch
        self._seen.add(rows, keys, keep_places=self._keeps_places)
        deep = (rows[:, LACKS] >> len(self._seen.lacks)).tolist()
        if self.deep is None and any(deep):
            first = deep.index(1)
            shard = self.names[rows[first, SHARD]]
            self.deep = f"shard {shard}, sample {keys[first]}: the image"
        return tuple(pair), PairBatch(rows[:, ID].clone(), rows[:, GROUPS:].clone())

    def end_epoch(self, epoch: int, report: MinerReport | None) -> FlagRates:
        """Bring together what the processes have seen; return the rates of the epoch's pairs."""
        flagged, *_ = gather_objects(None if report is None else report.flagged().ids)
        own_counts: list[IntArray] = []
        own_places: dict[int, Place] = {}
        if flagged is not None:
            ids, codes = self._seen.codes()
            own_counts = count_flagged(np.isin(ids, flagged), codes, self.codebook)
            own_places = self._seen.places(None if self._describes_all else flagged.tolist())
        own = (self._seen.count, self._seen.lacks, own_counts, own_places)
        pairs, lacks, counts, places = zip(*gather_objects(own), strict=True)
        self._seen = SeenPairs(len(self._stage.coders))
        self._warn_of_lacks(epoch, sum(pairs), sum(lacks).tolist())
        if report is None:
            return {}
        self._places = {pair: place for part in places for pair, place in part.items()}
        of_attributes = [np.sum(parts, axis=0) for parts in zip(*counts, strict=True)]
        return flag_rates(of_attributes, self.codebook)

    def describe(self, ids: IntArray) -> dict[str, Sequence[object]]:
        """Return shard, key and labels; nothing for a pair that this epoch has not seen."""
        names = [*self.names, ""]  # -1, of what is unknown, is the last
        nowhere: Place = (-1, "", (UNKNOWN,) * len(self.codebook.labels))
        places = [self._places.get(pair, nowhere) for pair in ids.tolist()]
        columns: dict[str, Sequence[object]] = {
            "shard": [names[shard] for shard, _, _ in places],
            "key": [key for _, key, _ in places],
        }
        for column, (attribute, labels) in enumerate(self.codebook.labels.items()):
            values = (*labels, "")
            columns[attribute_column(attribute)] = [values[codes[column]] for *_, codes in places]
        return columns

    def _warn_of_lacks(self, epoch: int, pairs: int, lacks: Sequence[int]) -> None:
        id_key = f"id under {self._stage.id_key!r} (named by shard and key instead)"
        keys = (f"key {name!r}" for name in self._stage.coders)
        whats = ["json member", id_key, *keys, "caption (trained as empty text)"]
        found = [f"{n} have no {what}" for n, what in zip(lacks, whats, strict=True) if n]
        if found:
            self._warn(
                f"of {pairs} pairs in epoch {epoch}, {', '.join(found)}; a missing group is "
                "unknown (-1), and this is said only once",
                kind="lacks",
            )
