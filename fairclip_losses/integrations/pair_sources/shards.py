"""Pairs streamed from webdataset shards."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...data import CodeBook
from ...data.groups import IntArray
from ...errors import UsageError
from ...miners import MinerReport
from ..fair_options import FairOptions
from ..pair_files import FlagRates, attribute_column
from .base import PairBatch, PairSource, count_flagged, flag_rates
from .exchange import of_all_processes, of_first_process, place
from .seen_pairs import PairPlaces, SeenPairs
from .shard_files import shard_names
from .shard_host import check_host_options, insert_stage, shard_urls
from .shard_samples import ID, PairStage, count_lacks, groups_of
from .shard_survey import ShardSurvey

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _EpochPart:
    """What one process has to say of an epoch."""

    pairs: int
    lacks: IntArray  # as `ShardSource._lacks`
    counts: list[IntArray]  # of `count_flagged`
    places: PairPlaces | None
    shared_id: str  # "" where all ids are of one pair each


class ShardSource(PairSource):
    """The samples of webdataset shards: ids and groups come with each from its json member.

    Groups whose labels are not given (``--fair-attributes race=a,b``) become known by one reading
    of the json members of all shards, shared out among the processes, after the host has made its
    loader. The source remembers where the pairs of the running epoch are, so that the flagged can
    be found.
    """

    def __init__(self, args: Any, options: FairOptions) -> None:
        self.where = args.train_data
        self.attributes = options.fair_attributes
        self.id_key = options.fair_id_key
        self.accum_freq = args.accum_freq
        self.codebook = CodeBook({})
        self.names = shard_names(shard_urls(args))
        self._keeps_places = "dbpm" in options.fair_loss
        self._seen = SeenPairs(len(self.attributes))
        self._places = self._seen.places(None)
        self._pairs = 0
        # (2, 1 + C): samples without json or key, for the id and each attribute.
        self._lacks = torch.zeros(2, 1 + len(self.attributes), dtype=torch.int64)
        self._warned = self._warned_of_ids = False
        check_host_options(args, len(self.names))
        self._survey = ShardSurvey(self.names, args, options)
        self._survey.look()

    # ---- before training

    def attach(self, loader: Any) -> None:
        """Learn the labels, and put a stage into the host's pipeline."""
        if loader.num_batches < self.accum_freq:
            raise UsageError(
                f"{self.where}: an epoch has {loader.num_batches} batches, fewer than one step "
                f"takes (--accum-freq {self.accum_freq})"
            )
        coders = self._survey.learn_labels()
        self.codebook = CodeBook({name: tuple(coder.labels) for name, coder in coders.items()})
        numbers = {url: (number, name) for number, (url, name) in enumerate(self.names.items())}
        insert_stage(loader, PairStage(numbers, coders, self.id_key))

    def identity(self) -> str:
        """Hashes name pairs as long as the shards are the same; ids of their own always do."""
        if self.id_key is not None:
            return "named by their ids"
        digest = hashlib.sha256("\n".join(sorted(self.names.values())).encode())
        return f"{len(self.names)} shards {digest.hexdigest()[:12]}"

    # ---- in training

    def take(self, batch: Sequence[Any]) -> tuple[tuple[Any, ...], PairBatch]:
        """Take the samples' rows and keys off the batch, and count what they lack."""
        *pair, (rows, keys) = batch
        self._pairs += len(rows)
        self._lacks += count_lacks(rows)
        if self._keeps_places:
            self._seen.add(rows, keys)
        return tuple(pair), PairBatch(rows[:, ID].clone(), groups_of(rows))

    def end_epoch(
        self, epoch: int, report: MinerReport | None, *, everything: bool = False
    ) -> FlagRates:
        """Bring together what the processes have seen; return the rates of the epoch's pairs."""
        flagged = of_first_process(None if report is None else report.flagged().ids)
        counts: list[IntArray] = []
        places = None
        if flagged is not None:
            ids, codes = self._seen.codes()
            counts = count_flagged(np.isin(ids, flagged), codes, self.codebook)
            places = self._seen.places(None if everything else flagged)
        own = _EpochPart(self._pairs, self._lacks.numpy(), counts, places, self._shared_id())
        parts = of_all_processes(own)
        self._seen.clear()
        self._warn_of_ids(epoch, [p.shared_id for p in parts if p.shared_id])
        lacks = np.sum([p.lacks for p in parts], axis=0)
        self._warn_once(epoch, sum(p.pairs for p in parts), lacks)
        self._pairs = 0
        if report is None:
            return {}
        self._places = PairPlaces.merged([p.places for p in parts if p.places is not None])
        of_attributes = zip(*(p.counts for p in parts), strict=True)
        counts = [np.sum(of_attribute, axis=0) for of_attribute in of_attributes]
        return flag_rates(counts, self.codebook)

    def describe(self, ids: IntArray) -> dict[str, Sequence[object]]:
        """Return shard, key and labels; nothing for a pair that this epoch has not seen."""
        places, rows = self._places, self._places.rows_of(ids)
        names = list(self.names.values())
        columns: dict[str, Sequence[object]] = {
            "shard": [names[places.shards[row]] if row >= 0 else "" for row in rows],
            "key": [places.keys[row] if row >= 0 else "" for row in rows],
        }
        for column, (attribute, labels) in enumerate(self.codebook.labels.items()):
            codes = [places.codes[row, column] if row >= 0 else -1 for row in rows]
            columns[attribute_column(attribute)] = [
                labels[code] if code >= 0 else "" for code in codes
            ]
        return columns

    def _shared_id(self) -> str:
        """Say of an id of their own that two pairs have which they are."""
        # Hashes differ where shard or key do. Without mining there is nothing to be shared.
        found = None if self.id_key is None else self._seen.shared_id()
        if found is None:
            return ""
        pair_id, shard, key, other_shard, other_key = found
        names = list(self.names.values())
        return (
            f"{pair_id} is the id of shard {names[shard]}, sample {key} and of shard "
            f"{names[other_shard]}, sample {other_key}"
        )

    def _warn_of_ids(self, epoch: int, shared: Sequence[str]) -> None:
        if shared and not self._warned_of_ids and place()[0] == 0:
            self._warned_of_ids = True
            log.warning(
                "Fair loss: pairs of the same --fair-id-key %s share their history; in epoch %d %s",
                self.id_key, epoch, shared[0],
            )  # fmt: skip

    def _warn_once(self, epoch: int, pairs: int, lacks: IntArray) -> None:
        """Say what the samples lack at the end of the first epoch in which they lack something."""
        if self._warned or not lacks.any():
            return
        self._warned = True
        if place()[0] != 0:
            return
        found = []
        if without := lacks[0].max():
            found.append(f"{without} have no json member")
        if lacks[1, 0]:
            found.append(
                f"{lacks[1, 0]} no id under {self.id_key!r} (named by shard and key instead)"
            )
        for column, name in enumerate(self.attributes, start=1):
            if lacks[1, column]:
                found.append(f"{lacks[1, column]} no key {name!r}")
        log.warning(
            "Fair loss: of %d pairs in epoch %d, %s; a missing group is unknown (-1), and this is "
            "said only once",
            pairs, epoch, ", ".join(found),
        )  # fmt: skip
