"""What does bad pair mining cost a step, beside the published per-sample bookkeeping?

    python examples/benchmarks/mining.py [--threads 1] [--batch-size 256]

Both do the same job on the same shuffled batches, and are seen to agree before they are timed: from
the losses of a batch (on the CPU, with a graph) to the weighted losses, every visit recorded. The
published way is that of Dynamic Bad Pair Mining's released code (github.com/lanxiang1017/
DynamicBadPairMining_ICLR24): a dict of lists, into which each sample's loss is read back and
appended; a Gaussian density of the batch; and for each sample a search in two lists of flagged ids
(NumPy integers, as there), with a multiplication in place where it is found. Once an epoch it
sorts the dict, averages each list by itself and builds the two lists anew; that time is shared out
over the epoch's batches. The miner's step is timed a thousand times on end, which is about as long
as one of the loop's, and by itself right after other work, which leaves it cold caches. The
published statistics are those of `BadPairMiner` with the linear history not renormalised and the
density as weight. Thresholds are 2 deviations, the defaults of its command line.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
from method import conditions, interleaved, save
from scipy.stats import norm
from torch import Tensor

from fairclip_losses import BadPairMiner

EPOCHS, PAST, CUT = 10, 3, 2.0  # of the run; over already; deviations that flag
LARGEST_LOOP = 1_000_000
REPEATED = 1000


class PublishedBookkeeping:
    """The released code's bookkeeping, rebuilt from what it does."""

    def __init__(self, past: np.ndarray) -> None:
        # Keys are NumPy integers there, which makes each comparison of the search slower.
        self.losses = dict(zip(np.arange(past.shape[1]), past.T.tolist(), strict=True))

    def refresh(self) -> None:
        share = [(1 + epoch) / EPOCHS for epoch in range(PAST)]
        in_order = sorted(self.losses.items(), key=lambda item: item[1])
        history = {pair: np.mean(np.array(losses) * share) for pair, losses in in_order}
        mean, std = np.mean(list(history.values())), np.std(list(history.values()))
        self.density = norm(mean, std)
        self.noisy = [pair for pair in history if history[pair] <= mean - CUT * std]
        self.faulty = [pair for pair in history if history[pair] >= mean + CUT * std]

    def weigh(self, losses: Tensor, ids: Tensor) -> Tensor:
        for k in range(len(ids)):
            self.losses[ids[k].item()].append(losses[k].item())
        weights = self.density.pdf(losses.detach())
        for k in range(len(ids)):
            pair = ids[k].item()
            if pair in self.noisy or pair in self.faulty:
                losses[k] *= weights[k]
        return losses


def past_losses(pairs: int) -> Tensor:
    """Return (PAST, pairs) losses: each pair at a level of its own, with noise."""
    draw = torch.Generator().manual_seed(0)
    level = 2.0 + 0.3 * torch.randn(pairs, generator=draw)
    noise = (0.1 * torch.randn(pairs, generator=draw) for _ in range(PAST))
    return torch.stack([level + part for part in noise])


def filled_miner(pairs: int, past: Tensor | None) -> BadPairMiner:
    miner = BadPairMiner(
        pairs, total_epochs=EPOCHS, noisy_sigma=CUT, faulty_sigma=CUT, warmup_epochs=PAST,
        history="linear", renormalize=False, weighting="density",
    )  # fmt: skip
    if past is None:  # too many to fill: flag as many as in the other sizes
        draw = torch.Generator().manual_seed(1)
        miner.memory.kind[torch.randint(0, pairs, (pairs // 22,), generator=draw)] = 1
        miner.memory.mean.fill_(0.4)
        miner.memory.std.fill_(0.06)
        return miner
    for losses in past:
        for part in torch.arange(pairs).split(1 << 16):
            miner(losses[part], part)
        if losses is not past[-1]:
            miner.end_epoch()
    return miner


def batches(pairs: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return up to 64 shuffled batches (losses with a graph, ids) in which no pair comes twice."""
    draw = torch.Generator().manual_seed(2)
    wanted = size * min(pairs // size, 64)
    ids = torch.randint(0, pairs, (16 * wanted,), generator=draw).unique()
    ids = ids[torch.randperm(len(ids), generator=draw)][:wanted]
    leaf = (2.0 + 0.3 * torch.randn(wanted, generator=draw)).requires_grad_()
    return [(1.0 * leaf[k : k + size], ids[k : k + size]) for k in range(0, wanted, size)]


def timed(run: Callable[[], object]) -> float:
    """Return the processor time of one run."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(pairs: int, size: int) -> dict[str, object]:
    with_loop = pairs <= LARGEST_LOOP
    past = past_losses(pairs) if with_loop else None
    miner = filled_miner(pairs, past)
    refresh = {"miner": timed(miner.end_epoch)} if with_loop else {}
    drawn = itertools.cycle(batches(pairs, size))
    flagged = float((miner.memory.kind != 0).float().mean())

    def one() -> Tensor:
        losses, ids = next(drawn)
        return miner(losses, ids) * losses

    def ours() -> None:
        for _ in range(REPEATED):
            one()

    runs: dict[str, Callable[[], object]] = {"miner": ours}
    if past is not None:
        published = PublishedBookkeeping(past.numpy().astype(np.float64))
        refresh["published"] = timed(published.refresh)
        losses, ids = next(drawn)
        # Their histories shrink to a fifth here; at losses of that size the densities are not 0.
        losses = losses * (PAST + 1) / (2 * EPOCHS)
        weighed = miner(losses, ids, record=False) * losses
        assert 0 < int((weighed != losses).sum()) < len(ids)
        np.testing.assert_allclose(
            published.weigh(losses.clone(), ids).detach(), weighed.detach(), rtol=1e-4
        )

        def loop() -> Tensor:
            losses, ids = next(drawn)
            return published.weigh(losses.clone(), ids)

        runs["published"] = loop
    other = torch.ones(1000, 1000)
    runs["other work"] = lambda: other @ other
    runs["miner after other work"] = one
    steps = interleaved(runs, rounds=30)
    for key in ("median_s", "iqr_s", "cpu_median_s"):
        steps["miner"][key] /= REPEATED
    del steps["other work"]
    for taken in steps.values():
        del taken["all_s"], taken["cpu_all_s"]
    row: dict[str, object] = {"pairs": pairs, "batch": size, "flagged": flagged}
    row |= {"step": steps, "refresh_s": refresh}
    shown = f"{pairs:>11,} pairs:"
    for name, taken in steps.items():
        shown += (
            f" {name} {1e6 * taken['median_s']:.1f} us ({1e6 * taken['cpu_median_s']:.1f} busy);"
        )
    if past is not None:
        row["ratios"] = found = ratios(steps, refresh, pairs / size)
        shown += " ratios " + ", ".join(f"{name} {ratio:.0f}" for name, ratio in found.items())
    print(shown, flush=True)
    return row


def ratios(
    steps: dict[str, dict[str, float]], refresh: dict[str, float], batches: float
) -> dict[str, float]:
    """Return how many times as long the published way takes, by the clock and by processor time."""
    found = {"refresh": refresh["published"] / refresh["miner"]}
    for kind, label in (("median_s", ""), ("cpu_median_s", ", busy")):
        ours, theirs = steps["miner"][kind], steps["published"][kind]
        found[f"step{label}"] = theirs / ours
        found[f"step after other work{label}"] = theirs / steps["miner after other work"][kind]
        found[f"step and its share of the refresh{label}"] = (
            theirs + refresh["published"] / batches
        ) / (ours + refresh["miner"] / batches)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = conditions()
    sizes = (10_000, 100_000, LARGEST_LOOP, 100_000_000)
    rows = [measure(pairs, options.batch_size) for pairs in sizes]
    print(save("mining_cpu", __doc__.split("\n\n")[0], rows, where))


if __name__ == "__main__":
    main()
