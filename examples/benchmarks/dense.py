"""What does the divergence of clouds in space (D > 1) cost, in time and in memory?

    python examples/benchmarks/dense.py [--threads 1] [--quick] [--large]

Two clouds of N points, the means half a deviation apart, float32, forward and backward, p = 2 and
1, blur a twentieth of the box's diagonal. geomloss (tensorized) runs its default annealing; ours
runs the same one with as many updates of the potentials (``iterations``), and once more until it
has converged. Errors are relative, against float64 at tol 1e-10. The peak is the most memory that
the CPU allocator gave out at a time during a call, the inputs not counted. Last, blurs of a
hundredth and a thousandth of the diagonal, to convergence, by ourselves.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable

import torch
from geomloss import SamplesLoss
from method import conditions, interleaved, save
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fairclip_losses.ops import sinkhorn_divergence, sinkhorn_solve

Answer = tuple[Tensor, Tensor]  # the value and its gradient in x


def clouds(n: int, dimension: int) -> tuple[Tensor, Tensor, float]:
    """Return x and y (n, D) and the diagonal of the box around both."""
    draw = torch.Generator().manual_seed(0)
    x = 0.25 * torch.randn(n, dimension, generator=draw)
    y = 0.25 * torch.randn(n, dimension, generator=draw) + 0.125
    both = torch.cat([x, y])
    return x, y, float((both.amax(0) - both.amin(0)).norm())


def solve(function: Callable[..., Tensor], x: Tensor, y: Tensor) -> Answer:
    points = x.detach().requires_grad_()
    value = function(points, y)
    value.backward()
    return value.detach(), points.grad


def peak_megabytes(run: Callable[[], Answer]) -> float:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = torch.tensor([event.nbytes() for event in events]).cumsum(0)
    return float(held.max()) / 2**20


def compare(n: int, dimension: int, p: int) -> dict[str, object]:
    """Return the row of one size: time, memory and error of each way to solve it."""
    x, y, diameter = clouds(n, dimension)
    blur = diameter / 20
    # geomloss's: a start, the diameter, its halves above the blur, the blur, and a last update
    rounds = 4 + math.ceil(math.log2(diameter / blur))
    geomloss = SamplesLoss(
        "sinkhorn", p=p, blur=blur, scaling=0.5, diameter=diameter, backend="tensorized"
    )

    def same(x: Tensor, y: Tensor) -> Tensor:
        return sinkhorn_divergence(x, y, p=p, blur=blur, scaling=0.5, iterations=rounds)

    def converged(x: Tensor, y: Tensor) -> Tensor:
        return sinkhorn_divergence(x, y, p=p, blur=blur)

    def truth(x: Tensor, y: Tensor) -> Tensor:
        return sinkhorn_divergence(x, y, p=p, blur=blur, tol=1e-10)

    runs = {
        "ours, same rounds": lambda: solve(same, x, y),
        "ours, converged": lambda: solve(converged, x, y),
        "geomloss": lambda: solve(geomloss, x, y),
    }
    exact, slope = solve(truth, x.double(), y.double())
    answers = {name: run() for name, run in runs.items()}
    peaks = {name: peak_megabytes(run) for name, run in runs.items()}
    taken = interleaved(runs, rounds=5, most_seconds=40.0)
    print(f"N={n} D={dimension} p={p} blur={blur:.3f}, {rounds} rounds of annealing")
    row: dict[str, object] = {
        "n": n, "dimension": dimension, "p": p, "blur": blur, "rounds": rounds,
        "rounds_converged": sinkhorn_solve(x, y, p=p, blur=blur).iterations,
    }  # fmt: skip
    for name, (value, gradient) in answers.items():
        found = taken[name] | {
            "peak_mib": peaks[name],
            "value_error": float((value.double() - exact).abs() / exact.abs()),
            "gradient_error": float((gradient.double() - slope).norm() / slope.norm()),
        }
        row[name] = found
        print(
            f"  {name:18s} {found['median_s']:8.3f} s (processor {found['cpu_median_s']:.3f} s)"
            f"  peak {found['peak_mib']:7.1f} MiB"
            f"  value {found['value_error']:.0e}  gradient {found['gradient_error']:.0e}",
            flush=True,
        )
    for kind in ("same rounds", "converged"):
        ratio = taken["geomloss"]["median_s"] / taken[f"ours, {kind}"]["median_s"]
        row[f"geomloss over ours, {kind}"] = ratio
        print(f"  geomloss over ours, {kind}: {ratio:.1f}")
    return row


def converge(n: int, dimension: int, p: int, share: float) -> dict[str, object]:
    """Return the row of one problem at a small blur, whose dual is maximised on few entries."""
    x, y, diameter = clouds(n, dimension)
    start = time.perf_counter()
    solve(lambda x, y: sinkhorn_divergence(x, y, p=p, blur=share * diameter), x, y)
    taken = time.perf_counter() - start
    found = sinkhorn_solve(x, y, p=p, blur=share * diameter)
    row = {
        "n": n, "dimension": dimension, "p": p, "blur over diagonal": share, "time_s": taken,
        "rounds_converged": found.iterations, "marginal_error": float(found.marginal_error),
        "converged": bool(found.converged),
    }  # fmt: skip
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="N <= 1024 only")
    parser.add_argument("--large", action="store_true", help="N = 8192 too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # other packages' own, of their inputs
    where = conditions()
    sizes = [256, 512, 1024]
    sizes += [] if arguments.quick else [4096, 8192] if arguments.large else [4096]
    rows = [compare(n, dimension, p) for p in (2, 1) for n in sizes for dimension in (2, 16, 64)]
    rows += [
        converge(n, dimension, p, share)
        for n in ([1000] if arguments.quick else [1000, 4000])
        for p in (2, 1)
        for dimension in (2, 16)
        for share in (1e-2, 1e-3)
    ]
    question = (__doc__ or "").strip().splitlines()[0]
    print(save(f"dense_cpu_{arguments.threads}_threads", question, rows, where))


if __name__ == "__main__":
    main()
