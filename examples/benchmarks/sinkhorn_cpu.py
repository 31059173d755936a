"""What does the fairness term's divergence cost a training step, and how right is it?

    python examples/benchmarks/sinkhorn_cpu.py [--threads 1] [--quick]

G groups against a batch of N scores on a line, float32, forward and backward; geomloss and POT on
the same inputs in the same process. Beside each time stand the relative errors of value and
gradient against a float64 truth: all costs in memory at tol 1e-10 (blur > 0; by Newton's method up
to N = 512) or POT's exact `wasserstein_1d` in float64 (blur = 0).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

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
        truth = ours(exact_scores, exact_weights, p, blur, tol=1e-10, backend="dense")
        runs["geomloss loop"] = lambda: geomloss_loop(scores, weights, p, blur)
        if n <= 256:
            runs["geomloss batched"] = lambda: geomloss_batched(scores, weights, p, blur)
    accuracy = {name: errors(run(), truth) for name, run in runs.items()}
    taken = interleaved(runs)
    kind = "clustered" if clustered else "spread"
    print(f"G={groups} N={n} p={p} blur={blur} {kind}")
    for name in runs:
        print(
            f"  {name:20s} {1e3 * taken[name]['median_s']:10.2f} ms"
            f"  value {accuracy[name]['value_error']:.0e}"
            f"  gradient {accuracy[name]['gradient_error']:.0e}",
            flush=True,
        )
    return {
        "groups": groups, "n": n, "p": p, "blur": blur, "scores": kind,
        "runs": {name: taken[name] | accuracy[name] for name in runs},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="leave out the sizes above 256")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # other packages' own, of their inputs
    where = conditions()
    sizes = [(3, 32), (3, 256)] if arguments.quick else [(3, 32), (3, 256), (8, 1024)]
    rows = [compare(*size, p, 0.0, False) for size in sizes for p in (1, 2)]
    for size in sizes:
        rows += [compare(*size, p, 0.05, clustered) for p in (1, 2) for clustered in (False, True)]
        rows.append(compare(*size, 2, 1e-4, False))
    question = (__doc__ or "").strip().splitlines()[0]
    print(save(f"sinkhorn_cpu_{arguments.threads}_threads", question, rows, where))


if __name__ == "__main__":
    main()
