"""The miner: a memory of every pair's losses, the flags found in it, and its report."""

from .bad_pair_miner import BadPairMiner, EpochSummary, MinerReport

__all__ = ["BadPairMiner", "EpochSummary", "MinerReport"]
