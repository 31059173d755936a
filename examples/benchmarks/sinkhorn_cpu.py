"""What does the fairness term's divergence cost a training step, and how right is it?

    python examples/benchmarks/sinkhorn_cpu.py [--threads 1] [--quick]

G groups against a batch of N scores on a line, float32, forward and backward; geomloss and POT on
the same inputs in the same process. Beside each time stand the relative errors of value and
gradient against a float64 truth: Newton's method at tol 1e-10 (blur > 0; up to N = 512 on all costs
in memory, another program than the one that is timed) or POT's exact `wasserstein_1d` in float64
(blur = 0).
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from method import conditions, interleaved, save
from torch import Tensor

from fairclip_losses.ops import sinkhorn_divergence

Answer = tuple[Tensor, Tensor]  # values (G,) and the gradient (N,) of their sum


def batch(groups: int, n: int, clustered: bool) -> tuple[Tensor, Tensor]:
    """Return scores (N,) in [-1, 1] or so, as cosines are, and group weights (G, N)."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.arange(n) % groups
    scores = 0.25 * torch.randn(n, generator=draw) + 0.05 * codes
    if clustered:
        tail = torch.rand(n, generator=draw) < 0.1
        scores = torch.where(tail, 0.5 + scores.abs(), 0.01 * scores)
    return scores, (codes == torch.arange(groups)[:, None]).float()


def published(groups: int, n: int) -> tuple[Tensor, Tensor]:
    """Return the batch's scores (N,) and, for every group, as many of its own (G, N).

    The published code draws a batch of each group's samples besides, so that no point is common.
    """
    draw = torch.Generator().manual_seed(1)
    own = 0.25 * torch.randn(groups, n, generator=draw) + 0.05 * torch.arange(groups)[:, None]
    return batch(groups, n, clustered=False)[0], own


def ours_published(scores: Tensor, own: Tensor, p: int, blur: float) -> Answer:
    x = scores[:, None].clone().requires_grad_()
    value = sinkhorn_divergence(x, own[..., None], p=p, blur=blur)
    value.sum().backward()
    return value.detach(), x.grad[:, 0]


def geomloss_published(scores: Tensor, own: Tensor, p: int, blur: float) -> Answer:
    from geomloss import SamplesLoss

    loss = SamplesLoss("sinkhorn", p=p, blur=blur, backend="tensorized")
    x = scores[:, None].clone().requires_grad_()
    value = torch.stack([loss(x, row[:, None]) for row in own])
    value.sum().backward()
    return value.detach(), x.grad[:, 0]


def pot_published(scores: Tensor, own: Tensor, p: int) -> Answer:
    import ot

    x = scores.clone().requires_grad_()
    value = ot.wasserstein_1d(x[:, None].expand(*own.T.shape), own.T, p=p) / p
    value.sum().backward()
    return value.detach(), x.grad


def ours(scores: Tensor, weights: Tensor, p: int, blur: float, **options: object) -> Answer:
    x = scores[:, None].clone().requires_grad_()
    value = sinkhorn_divergence(x, x, None, weights.to(x.dtype), p=p, blur=blur, **options)
    value.sum().backward()
    return value.detach(), x.grad[:, 0]


def geomloss_loop(scores: Tensor, weights: Tensor, p: int, blur: float) -> Answer:
    from geomloss import SamplesLoss

    loss = SamplesLoss("sinkhorn", p=p, blur=blur, backend="tensorized")
    x = scores[:, None].clone().requires_grad_()
    value = torch.stack([loss(x, x[row > 0]) for row in weights])
    value.sum().backward()
    return value.detach(), x.grad[:, 0]


def geomloss_batched(scores: Tensor, weights: Tensor, p: int, blur: float) -> Answer:
    from geomloss import SamplesLoss

    loss = SamplesLoss("sinkhorn", p=p, blur=blur, backend="tensorized")
    x = scores[:, None].clone().requires_grad_()
    groups, n = weights.shape
    points = x.expand(groups, n, 1).contiguous()
    b = weights / weights.sum(1, keepdim=True)
    value = loss(torch.full_like(b, 1 / n), points, b, points)
    value.sum().backward()
    return value.detach(), x.grad[:, 0]


def pot_exact(scores: Tensor, weights: Tensor, p: int, blur: float) -> Answer:
    import ot

    x = scores.clone().requires_grad_()
    groups, n = weights.shape
    points = x[:, None].expand(n, groups)
    b = (weights / weights.sum(1, keepdim=True)).T
    value = ot.wasserstein_1d(points, points, torch.full_like(b, 1 / n), b, p=p) / p
    value.sum().backward()
    return value.detach(), x.grad


def errors(found: Answer, truth: Answer) -> dict[str, float]:
    value, gradient = (part.double() for part in found)
    exact, slope = truth
    return {
        "value_error": ((value - exact).abs() / exact.abs()).max().item(),
        "gradient_error": ((gradient - slope).norm() / slope.norm()).item(),
    }


def compare(groups: int, n: int, p: int, blur: float, clustered: bool) -> dict[str, object]:
    """Return the row of one problem: time and error of each way to solve it."""
    scores, weights = batch(groups, n, clustered)
    exact_scores, exact_weights = scores.double(), weights.double()
    runs: dict[str, Callable[[], Answer]] = {"ours": lambda: ours(scores, weights, p, blur)}
    if blur == 0:
        truth = pot_exact(exact_scores, exact_weights, p, blur)
        runs["POT wasserstein_1d"] = lambda: pot_exact(scores, weights, p, blur)
    else:
        options = {"backend": "dense"} if n <= 512 else {}
        truth = ours(exact_scores, exact_weights, p, blur, tol=1e-10, **options)
        runs["geomloss loop"] = lambda: geomloss_loop(scores, weights, p, blur)
        if n <= 256:
            runs["geomloss batched"] = lambda: geomloss_batched(scores, weights, p, blur)
    kind = "clustered" if clustered else "spread"
    problem = {"groups": groups, "n": n, "p": p, "blur": blur, "scores": kind}
    return report(problem, runs, truth)


def report(
    problem: dict[str, object], runs: dict[str, Callable[[], Answer]], truth: Answer
) -> dict[str, object]:
    """Time the runs and hold them against the truth; print and return the row."""
    accuracy = {name: errors(run(), truth) for name, run in runs.items()}
    taken = interleaved(runs)
    print(" ".join(f"{name}={value}" for name, value in problem.items()))
    for name in runs:
        print(
            f"  {name:20s} {1e3 * taken[name]['median_s']:10.3f} ms"
            f"  value {accuracy[name]['value_error']:.0e}"
            f"  gradient {accuracy[name]['gradient_error']:.0e}",
            flush=True,
        )
    return problem | {"runs": {name: taken[name] | accuracy[name] for name in runs}}


def compare_published(groups: int, n: int) -> dict[str, object]:
    """Return the row of the published setting: p = 2, blur 1e-4, against the exact cost."""
    scores, own = published(groups, n)
    truth = pot_published(scores.double(), own.double(), 2)
    runs: dict[str, Callable[[], Answer]] = {
        "ours": lambda: ours_published(scores, own, 2, 0.0),
        "POT wasserstein_1d": lambda: pot_published(scores, own, 2),
        "geomloss loop": lambda: geomloss_published(scores, own, 2, 1e-4),
    }
    return report({"groups": groups, "n": n, "p": 2, "blur": 0.0, "scores": "published"},
                  runs, truth)  # fmt: skip


def exact_against_a_sort(groups: int, n: int, p: int) -> dict[str, object]:
    """Return the row of a large exact problem, beside one sort and one cumulative sum in torch."""
    scores, weights = batch(groups, n, clustered=False)
    scores = scores + 1e-4 * torch.randn(n, generator=torch.Generator().manual_seed(2))
    truth = pot_exact(scores.double(), weights.double(), p, 0.0)

    def sort_and_sum() -> Answer:
        scores.sort()
        weights.cumsum(-1)
        return truth

    runs: dict[str, Callable[[], Answer]] = {
        "ours": lambda: ours(scores, weights, p, 0.0),
        "one sort and one cumsum": sort_and_sum,
        "POT wasserstein_1d": lambda: pot_exact(scores, weights, p, 0.0),
    }
    problem = {"groups": groups, "n": n, "p": p, "blur": 0.0, "scores": "spread"}
    return report(problem, runs, truth)


def table(rows: list[dict[str, Any]]) -> str:
    """Return milliseconds and, in brackets, the relative error of the gradient, a row a problem."""
    ways = ["ours", "geomloss loop", "geomloss batched", "POT wasserstein_1d"]
    lines = [
        f"| (G, N) | p | blur | scores | {' | '.join(ways)} |",
        "|---" * (4 + len(ways)) + "|",
    ]
    for row in rows:
        cells = [
            f"{1e3 * run['median_s']:.2f} ({run['gradient_error']:.0e})" if run else ""
            for run in (row["runs"].get(way) for way in ways)
        ]
        size = f"({row['groups']}, {row['n']:,})"
        head = f"| {size} | {row['p']} | {row['blur']:g} | {row['scores']} |"
        lines.append(f"{head} {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="leave out the sizes above 256")
    parser.add_argument("--table", type=Path, help="print a result's table in Markdown instead")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())["rows"]))
        return
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # other packages' own, of their inputs
    where = conditions()
    sizes = [(3, 32), (3, 256)] if arguments.quick else [(3, 32), (3, 256), (8, 1024)]
    rows = [compare(*size, p, 0.0, False) for size in sizes for p in (1, 2)]
    rows += [compare_published(*size) for size in sizes]
    if not arguments.quick:
        rows += [exact_against_a_sort(32, 32768, p) for p in (1, 2)]
    for size in sizes:
        rows += [compare(*size, p, 0.05, clustered) for p in (1, 2) for clustered in (False, True)]
        rows.append(compare(*size, 2, 1e-4, False))
    question = (__doc__ or "").strip().splitlines()[0]
    print(save(f"sinkhorn_cpu_{arguments.threads}_threads", question, rows, where))


if __name__ == "__main__":
    main()
