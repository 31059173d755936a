"""What does the miner's bookkeeping cost a step, beside a plain per-sample loop?

    python examples/benchmarks/mining.py [--threads 1]

The loop is the way of published code: for each sample one number read back from the device, a
search of the list of flagged ids (5 % of the pairs), and a Python weight. The miner is called as in
training.
"""

from __future__ import annotations

import argparse
import math

import torch
from method import conditions, interleaved, save

from fairclip_losses import BadPairMiner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    count = options.batch_size
    where, rows = conditions(), []
    for pairs in (10_000, 100_000, 1_000_000, 100_000_000):
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, pairs, (count,), generator=draw)
        losses = torch.rand(count, generator=draw)
        miner = BadPairMiner(pairs, faulty_sigma=1.0)
        memory: dict[int, list[float]] = {}
        flagged = torch.randint(0, pairs, (min(pairs, 10_000_000) // 20,), generator=draw).tolist()

        def loop(ids=ids, losses=losses, memory=memory, flagged=flagged) -> list[float]:
            weights = []
            for k in range(len(ids)):
                pair, loss = ids[k].item(), losses[k].item()
                memory.setdefault(pair, []).append(loss)
                bad = pair in flagged
                weights.append(math.exp(-0.5 * ((loss - 0.5) / 0.1) ** 2) if bad else 1.0)
            return weights

        runs = {"miner": lambda miner=miner, a=losses, b=ids: miner(a, b)}
        if pairs <= 1_000_000:
            runs["loop"] = loop
        times = interleaved(runs, rounds=9)
        ratio = times["loop"]["median_s"] / times["miner"]["median_s"] if "loop" in times else None
        rows.append({"pairs": pairs, "batch": count, **times, "ratio": ratio})
        shown = "" if ratio is None else f", loop {times['loop']['median_s']:.4f} s ({ratio:.0f}x)"
        print(f"{pairs:>11,} pairs: miner {times['miner']['median_s'] * 1e3:.3f} ms{shown}")
    print(save("mining_cpu", __doc__.split("\n\n")[0], rows, where))


if __name__ == "__main__":
    main()
