"""What does the whole fair loss cost, beside the loss that it replaces?

    python examples/benchmarks/fair_loss.py [--loss clip] [--batches 256 1024 4096] [--threads 1]

Forward and backward from the features (D = 512) of open_clip's loss, of that loss in `FairLoss`
without mining and fairness, and with both (preset ``aligned``, one attribute of 3 groups). Peak
memory is what one forward and backward pass holds at most beside the features.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from method import conditions, interleaved, paired, save
from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss

from fairclip_losses import build_fair_loss

WIDTH, TOKENS, VOCABULARY, PAIRS = 512, 16, 512, 100_000
LOSSES = {
    "clip": ClipLoss,
    "siglip": SigLipLoss,
    "coca": lambda: CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0),
    "distill": DistillClipLoss,
}


def model_output(kind: str, count: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return what a model gives the loss: pairs that agree in part, and a scale of 50."""
    image = F.normalize(torch.randn(count, WIDTH, device=device), dim=1)
    text = F.normalize(image + 0.1 * torch.randn_like(image), dim=1)
    out = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(50.0)}
    if kind == "siglip":
        out["logit_bias"] = torch.tensor(-10.0)
    out = {name: value.to(device).requires_grad_() for name, value in out.items()}
    if kind == "distill":
        out |= {f"dist_{name}": value.detach().clone() for name, value in out.items()}
    if kind == "coca":
        out["logits"] = torch.randn(count, TOKENS, VOCABULARY, device=device).requires_grad_()
        out["labels"] = torch.randint(0, VOCABULARY, (count, TOKENS), device=device)
    return out


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the most that one run holds at a time beside what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--loss", choices=sorted(LOSSES), default="clip")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    where = conditions() | {"loss": options.loss, "width": WIDTH, "device": options.device}
    rows: list[dict[str, object]] = []
    for count in options.batches:
        out = model_output(options.loss, count, device)
        leaves = [value for value in out.values() if value.requires_grad]
        ids = torch.randperm(PAIRS, device=device)[:count]
        groups = torch.randint(0, 3, (count,), device=device)
        base = LOSSES[options.loss]()
        fair = build_fair_loss(base, num_pairs=PAIRS, num_groups=3).to(device)
        none = build_fair_loss(base, mining=False, fairness=False)

        def step(loss: torch.nn.Module, **beside: torch.Tensor) -> None:
            result = loss(**out, **beside)  # noqa: B023 (called within this turn)
            total = sum(result) if isinstance(result, tuple) else result
            torch.autograd.grad(total, leaves)  # noqa: B023
            if device.type == "cuda":
                torch.cuda.synchronize()

        runs = {
            "open_clip": lambda: step(base),  # noqa: B023
            "FairLoss without parts": lambda: step(none),  # noqa: B023
            "FairLoss with both": lambda: step(fair, pair_ids=ids, groups=groups),  # noqa: B023
        }
        times = interleaved(runs, rounds=options.rounds, most_seconds=60.0)
        peaks = {name: peak_bytes(run, device) for name, run in runs.items()}
        for name, taken in times.items():
            ratio = paired(times, name, "open_clip")
            memory = peaks[name] / peaks["open_clip"]
            median = {key: value for key, value in taken.items() if not key.endswith("all_s")}
            rows.append(
                {"batch": count, "loss": name, **median, "of_open_clip": ratio,
                 "peak_bytes": peaks[name], "peak_of_open_clip": memory}
            )  # fmt: skip
            print(
                f"B = {count:5d}  {name:24s} {1e3 * taken['median_s']:9.2f} ms (quartiles "
                f"{1e3 * taken['iqr_s']:.2f} apart): {ratio['ratio']:.2f} of open_clip's, peak "
                f"{peaks[name] / 2**20:.1f} MiB, {memory:.2f} of it",
                flush=True,
            )
    name = f"fair_loss_{options.loss}_{device.type}_{options.threads}_threads"
    print(save(name, __doc__.split("\n\n")[0], rows, where))


if __name__ == "__main__":
    main()
