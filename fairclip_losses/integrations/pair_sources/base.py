"""What the fair loss asks of a source of training pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ...data.groups import CodeBook, IntArray
from ...miners import MinerReport
from ..pair_files import FlagRates


class PairBatch(NamedTuple):
    """What travels beside a batch of B pairs, on the CPU."""

    ids: Tensor  # (B,) int64
    groups: Tensor  # (B, C) int64 group codes, -1 unknown


class PairSource(ABC):
    """A source of training pairs that knows each pair's id and groups.

    The data are checked when it is made, before the host builds its model. Then, in this order::

        source.attach(loader)                         # the host's loader now carries the metadata
        for each epoch:
            for batch in loader:
                pair, metadata = source.take(batch)   # the host gets the pair
            source.end_epoch(report)                  # in every process
            source.describe(ids)                      # in the first process

    Attributes:
        codebook: what the group codes mean; complete after `attach`, the same in every process.
        num_pairs: number of pairs where their ids are 0..num_pairs-1, None for any int64 ids.
    """

    codebook: CodeBook
    num_pairs: int | None = None

    @abstractmethod
    def attach(self, loader: Any) -> None:
        """Make the host's training loader carry ids and groups beside its pairs.

        Raises:
            UsageError: the loader is not of the data that were checked, or is not known.
        """

    @abstractmethod
    def take(self, batch: Sequence[Any]) -> tuple[tuple[Any, ...], PairBatch]:
        """Return the batch as the host expects it, and what its last item, our own, says."""

    @abstractmethod
    def identity(self) -> str:
        """Return what the ids depend on: two runs with the same text name the same pairs alike."""

    @abstractmethod
    def end_epoch(
        self, epoch: int, report: MinerReport | None, *, everything: bool = False
    ) -> FlagRates:
        """End an epoch, in every process; return the flag rates where the report is given.

        Args:
            epoch: the epoch that has ended, from 0.
            report: the miner's report in the first process; None in the others, and without one.
            everything: prepare `describe` for all pairs, not only for the flagged ones.
        """

    @abstractmethod
    def describe(self, ids: IntArray) -> dict[str, Sequence[object]]:
        """Return by column name what is known of each pair for those who look for it."""


def count_flagged(
    flagged: npt.NDArray[np.bool_], codes: npt.NDArray[np.integer[Any]], codebook: CodeBook
) -> list[IntArray]:
    """Return for each attribute an array (G, 2): flagged pairs and all pairs of each group."""
    counts = []
    for column, groups in enumerate(codebook.num_groups.values()):
        known = codes[:, column] >= 0
        of_group = [
            np.bincount(codes[mask, column], minlength=groups) for mask in (known & flagged, known)
        ]
        counts.append(np.stack(of_group, axis=1))
    return counts


def flag_rates(counts: Sequence[IntArray], codebook: CodeBook) -> FlagRates:
    """Return attribute -> label -> share of the group's pairs that are flagged.

    Mining can silently down-weight a minority: these are the figures to watch. A group of which
    nothing was seen has no entry; pairs of unknown group count in none.
    """
    return {
        attribute: {
            label: float(flagged / seen)
            for label, (flagged, seen) in zip(labels, of_attribute, strict=True)
            if seen
        }
        for (attribute, labels), of_attribute in zip(codebook.labels.items(), counts, strict=True)
    }
