"""Many distinct streamed ids: what the miner's memory takes, and how it grows."""

from __future__ import annotations

import torch

from fairclip_losses import BadPairMiner
from fairclip_losses.miners.pair_memory import PairMemory

PAIRS, BATCH = 2_000_000, 250_000


def test_distinct_ids_take_less_than_24_bytes_each():
    miner = BadPairMiner()
    generator = torch.Generator().manual_seed(0)
    # An odd multiple of a counter is a permutation of the 64-bit integers: distinct, in no order.
    ids = torch.arange(1, PAIRS + 1) * 0x1E3779B97F4A7C15
    for part in ids.split(BATCH):
        miner(torch.rand(len(part), generator=generator), part)
    miner.state_dict()  # joins the log to the table
    assert len(miner.memory.table_ids) == PAIRS
    assert bool((miner.memory.table_ids[1:] > miner.memory.table_ids[:-1]).all())
    assert sum(value.nbytes for value in miner.memory.state().values()) < 24 * PAIRS
    assert int(miner.memory.visits.sum()) == PAIRS


def test_the_table_grows_seldom_and_whole(monkeypatch):
    """Growing costs a few tensor operations, as often as the logarithm of the pairs."""
    grown = []
    join = PairMemory.consolidate

    def watched(memory):
        before = len(memory.table_ids)
        join(memory)
        if len(memory.table_ids) > before:
            grown.append(len(memory.table_ids) - before)

    monkeypatch.setattr(PairMemory, "consolidate", watched)
    miner = BadPairMiner()
    for part in torch.arange(PAIRS).split(16_384):
        miner(torch.ones(len(part)), part)
    miner.end_epoch()
    assert sum(grown) == PAIRS
    assert len(grown) < 40
