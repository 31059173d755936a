"""The miner: a memory of every pair's losses, the flags found in it, and what it tells."""

from .bad_pair_miner import BadPairMiner
from .report import EpochSummary, MinerReport

__all__ = ["BadPairMiner", "EpochSummary", "MinerReport"]
