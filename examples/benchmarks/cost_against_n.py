"""How does the time of a divergence grow with the number of points?

    python examples/benchmarks/cost_against_n.py [--threads 1] [--quick]

Three groups against a batch of N scores on a line, N from 32 to a million, float32, forward and
backward, each way up to the size where one call takes ten seconds or its memory would not do. Also
draws the plot in docs/images.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from method import conditions, interleaved, save
from sinkhorn_cpu import batch, geomloss_batched, geomloss_loop, ours, pot_exact

SIZES = (32, 256, 1024, 4096, 16384, 65536, 262144, 1_000_000)
MOST_SECONDS = 10.0
PLOT = Path(__file__).parents[2] / "docs" / "images" / "cost_against_n.svg"

# Largest size a way is asked for: geomloss holds all N x N costs of several measures at once.
WAYS: dict[str, tuple[Callable[..., object], int, float, int]] = {
    "ours, exact, p = 1": (ours, 1, 0.0, SIZES[-1]),
    "ours, exact, p = 2": (ours, 2, 0.0, SIZES[-1]),
    "POT, exact, p = 2": (pot_exact, 2, 0.0, SIZES[-1]),
    "ours, blur 0.05, p = 1": (ours, 1, 0.05, SIZES[-1]),
    "ours, blur 0.05, p = 2": (ours, 2, 0.05, SIZES[-1]),
    "ours, blur 0.001, p = 2": (ours, 2, 0.001, SIZES[-1]),
    "geomloss loop, blur 0.05, p = 2": (geomloss_loop, 2, 0.05, 4096),
    "geomloss batched, blur 0.05, p = 2": (geomloss_batched, 2, 0.05, 1024),
}


def measure(sizes: tuple[int, ...]) -> list[dict[str, object]]:
    """Return a row a size; a way that took too long is left out of the larger sizes."""
    rows: list[dict[str, object]] = []
    too_slow: set[str] = set()
    for n in sizes:
        scores, weights = batch(3, n, clustered=False)
        runs = {}
        for name, (way, p, blur, largest) in WAYS.items():
            if n > largest or name in too_slow:
                continue
            start = time.perf_counter()
            way(scores, weights, p, blur)
            if time.perf_counter() - start > MOST_SECONDS:
                too_slow.add(name)
            runs[name] = partial(way, scores, weights, p, blur)
        taken = interleaved(runs, rounds=5, most_seconds=MOST_SECONDS)
        for name, summary in taken.items():
            print(f"N={n:8d} {name:36s} {1e3 * summary['median_s']:12.3f} ms", flush=True)
        rows.append({"groups": 3, "n": n, "runs": taken})
    return rows


def draw(rows: list[dict[str, object]], where: dict[str, object], path: Path) -> None:
    """Plot time against N on logarithmic axes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "fairclip_losses"
    figure, axes = plt.subplots(figsize=(9.5, 4.8), layout="constrained")
    for name in WAYS:
        points = [(row["n"], row["runs"][name]["median_s"]) for row in rows if name in row["runs"]]  # type: ignore[index, operator]
        style = "-" if name.startswith("ours") else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name)
    axes.set(xscale="log", yscale="log", xlabel="points N", ylabel="seconds, forward + backward")
    axes.set_title(f"3 groups, {where['processor']}, {where['threads']} thread(s)", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="up to 4,096 points, no plot")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # other packages' own, of their inputs
    where = conditions()
    rows = measure(SIZES[:4] if arguments.quick else SIZES)
    question = (__doc__ or "").strip().splitlines()[0]
    path = save(f"cost_against_n_{arguments.threads}_threads", question, rows, where)
    print(path)
    if not arguments.quick:
        draw(json.loads(path.read_text())["rows"], where, PLOT)
        print(PLOT)


if __name__ == "__main__":
    main()
