"""What the json members of shards say before training: a first look, and a reading of all."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...data.groups import UNKNOWN, GroupCoder, attribute_labels, shortened
from ...errors import UsageError, usage_errors
from ..fair_options import FairOptions
from .exchange import of_all_processes, place
from .shard_files import ShardReader, ShardReading, local_path

log = logging.getLogger(__name__)

# A first look before the model is built: enough to know a wrong key, and cheap on remote storage.
_LOOK_SHARDS, _LOOK_PAIRS = 3, 100


class ShardSurvey:
    """Checks the json members of shards, and learns the labels that are not given.

    Args:
        names: url -> name of each shard.
        args: the host's arguments.
        options: ours.
    """

    def __init__(self, names: Mapping[str, str], args: Any, options: FairOptions) -> None:
        self.names = names
        self.where = args.train_data
        self.workers = args.workers
        self.attributes = options.fair_attributes
        self.id_key = options.fair_id_key
        self.given = {
            name: GroupCoder(labels, others_unknown=name in options.fair_others_unknown)
            for name, labels in options.fair_labels.items()
        }

    def look(self) -> None:
        """Look at a few pairs and refuse what cannot work.

        Raises:
            UsageError: shards that cannot be read, keys that are not there, values that are no
                groups or ids, or an id of two pairs.
        """
        urls = list(self.names)
        places = np.unique(np.linspace(0, len(urls) - 1, _LOOK_SHARDS).round().astype(int))
        looked = [urls[k] for k in places]
        found = self._reader(looked, limit=_LOOK_PAIRS).read()
        where = f"{self.where}: the first pairs of {len(looked)} shard{'s' * (len(looked) > 1)}"
        if not found.pairs and found.unreadable:  # a few broken shards do not stop the host
            raise UsageError(f"--train-data: cannot read the shard {found.unreadable[0]}")
        if not found.pairs:
            bad = found.undecoded
            raise UsageError(
                f"{where}: expected samples with a caption (txt) and an image (jpg, jpeg, png or "
                f"webp), got {f'{bad} with a json member that is no JSON' if bad else 'none'}"
            )
        for name in self.attributes:
            self._check_key("--fair-attributes", name, found, where)
            self._check_values(name, found, where)
        self._check_refused(found)
        if self.id_key is not None:
            self._check_key("--fair-id-key", self.id_key, found, where)
            if found.bad_ids:
                raise UsageError(
                    f"--fair-id-key {self.id_key}: expected 64-bit integers or strings, got "
                    f"something else in {found.bad_ids} of {where}"
                )
        self._check_ids(found, where)

    def learn_labels(self) -> dict[str, GroupCoder]:
        """Return the attributes' coders: labels as given, others from a reading of all shards.

        Every process must call it.

        Raises:
            UsageError: an attribute without a known value, a value that is no label, or an id of
                two pairs.
        """
        bare = [name for name in self.attributes if name not in self.given]
        found = self._read_all() if bare else ShardReading()
        coders = dict(self.given)
        with usage_errors():
            for name in bare:
                where = f"{self.where}: key {name!r} of the json members"
                if not found.values[name]:
                    raise ValueError(
                        f"{where}: expected groups, got no known value in {found.pairs} pairs"
                    )
                coders[name] = GroupCoder(attribute_labels(found.values[name], where))
        return {name: coders[name] for name in self.attributes}

    def _check_key(self, flag: str, name: str, found: ShardReading, where: str) -> None:
        if not found.with_json:
            raise UsageError(f"{flag} {name}: {where} have no json member")
        if name not in found.keys:
            there = ", ".join(map(repr, found.keys))
            raise UsageError(f"{flag} {name}: {where} have no key {name!r}, only {there}")

    def _check_values(self, name: str, found: ShardReading, where: str) -> None:
        """Refuse labels that fit no value, values that are no groups, and labels out of reach."""
        values = found.values[name]
        if name in self.given:
            coder = self.given[name]
            if values and all(coder.code(value) in (None, UNKNOWN) for value in values):
                raise UsageError(
                    f"--fair-attributes {name}: {where} have none of the labels "
                    f"{shortened(coder.labels)}, but {shortened(sorted(values))}"
                )
            return
        if values:
            with usage_errors():
                attribute_labels(values, f"{where}: key {name!r} of the json member")
        for url in self.names:
            if local_path(url) is None:
                raise UsageError(
                    f"--fair-attributes {name}: its labels would have to be read from all shards, "
                    f"and {url} is no file of this machine; give them: {name}=LABEL,LABEL,..."
                )

    def _check_refused(self, found: ShardReading) -> None:
        if found.refused:
            raise UsageError(f"{self.where}: {found.refused[0]}")

    def _check_ids(self, found: ShardReading, where: str) -> None:
        if self.id_key is not None and len(twice := found.twice()):
            raise UsageError(
                f"--fair-id-key {self.id_key}: {where}: expected each id once, got {len(twice)} of "
                f"them more than once ({', '.join(map(str, twice[:3]))})"
            )

    def _reader(self, urls: Sequence[str], limit: int | None = None) -> ShardReader:
        coders = {name: self.given.get(name) for name in self.attributes}
        return ShardReader(urls, self.names, coders, self.id_key, limit)

    def _read_all(self) -> ShardReading:
        """Read all json members; each process reads its share, and all know what was found."""
        start = time.monotonic()
        rank, world = place()
        share = list(self.names)[rank::world]
        own = self._reader(share).read(self.workers) if share else ShardReading(shards=0)
        # Ids stay where they are: of 1e8 pairs they would be a gigabyte to exchange.
        twice = own.twice()
        own.ids = np.repeat(twice, 2)
        found = ShardReading.merged(of_all_processes(own))
        if rank == 0:
            log.info(
                "Fair loss: read the groups of %d pairs in %d shards in %.1f s",
                found.pairs, found.shards, time.monotonic() - start,
            )  # fmt: skip
            if found.unreadable:
                log.warning(
                    "Fair loss: %d shards cannot be read to their end, the first: %s",
                    len(found.unreadable), found.unreadable[0],
                )  # fmt: skip
            if self.id_key is None and len(twice := found.twice()):
                log.warning(
                    "Fair loss: %d ids are of two pairs or more, which share their history "
                    "(a key twice in a shard?)", len(twice),
                )  # fmt: skip
        self._check_refused(found)
        self._check_ids(found, f"{self.where}: {found.pairs} pairs")
        return found
