"""What a miner tells: the summary of an epoch, and the memory of every pair as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..functional import CLEAN, KIND_NAMES

__all__ = ["EpochSummary", "MinerReport"]


@dataclass(frozen=True)
class EpochSummary:
    """What :meth:`BadPairMiner.end_epoch` found.

    Attributes:
        epoch: number of epochs over, this one included.
        seen: number of pairs with a recorded loss, in all epochs so far.
        noisy: number of pairs now flagged noisy.
        faulty: number of pairs now flagged faulty.
        mean: mean of the pairs' histories; 0 where no pair was seen.
        std: population standard deviation of the pairs' histories; 0 where no pair was seen.
    """

    epoch: int
    seen: int
    noisy: int
    faulty: int
    mean: float
    std: float


@dataclass(frozen=True, eq=False)
class MinerReport:
    """The memory of the visited pairs, in ascending order of their ids; every array has shape (N,).

    Attributes:
        ids: pair ids, int64.
        visits: number of recorded losses, int64.
        history: history of the losses up to now, float64.
        z_score: the history standardised by the mean and deviation of the last ``end_epoch``,
            float64; 0 where the deviation is 0, NaN before the first ``end_epoch``.
        kind: ``"clean"``, ``"noisy"`` or ``"faulty"``, as flagged by the last ``end_epoch``.
        weight: weight of the pair at its last recorded loss, float64.
    """

    ids: npt.NDArray[np.int64]
    visits: npt.NDArray[np.int64]
    history: npt.NDArray[np.float64]
    z_score: npt.NDArray[np.float64]
    kind: npt.NDArray[np.str_]
    weight: npt.NDArray[np.float64]

    def __len__(self) -> int:
        """Return the number of visited pairs."""
        return len(self.ids)

    def counts(self) -> dict[str, int]:
        """Return the number of pairs of each kind; a kind without a pair counts 0."""
        return {name: int(np.count_nonzero(self.kind == name)) for name in KIND_NAMES}

    def flagged(self) -> MinerReport:
        """Return the report of the noisy and faulty pairs alone."""
        keep = self.kind != KIND_NAMES[CLEAN]
        return MinerReport(
            ids=self.ids[keep],
            visits=self.visits[keep],
            history=self.history[keep],
            z_score=self.z_score[keep],
            kind=self.kind[keep],
            weight=self.weight[keep],
        )
