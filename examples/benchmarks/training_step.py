"""What does the fair loss add to a whole training step, and to what the published scheme adds?

    python examples/benchmarks/training_step.py [--model ViT-B-32] [--batch-size 64] [--threads 4]

One optimizer step (forward, loss, backward, AdamW) of an open_clip model on random images and
texts: plain, with FairLoss (mining and fairness over two attributes of 3 and 2 groups), and by the
scheme of the published code: one further forward pass without gradients for each group, of a
batch's size, and geomloss on the scores. A step of a large model varies by more than the fair loss
costs: the three are compared round by round, and the losses are timed by themselves too, forward
and backward from the features, with what FairLoss adds there as a part of the plain step.
"""

from __future__ import annotations

import argparse

import open_clip
import torch
from geomloss import SamplesLoss
from method import conditions, interleaved, paired, save

from fairclip_losses import build_fair_loss

GROUPS = (3, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-published", action="store_true", help="it takes most of the time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, count = torch.device(options.device), options.batch_size

    model = open_clip.create_model(options.model, output_dict=True).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    images = torch.randn(count, 3, 224, 224, device=device)
    texts = torch.randint(1, 49000, (count, 77), device=device)
    groups = torch.stack([torch.randint(0, n, (count,), device=device) for n in GROUPS], 1)
    ids = torch.randperm(100_000)[:count].to(device)

    plain_loss = open_clip.ClipLoss()
    fair_loss = build_fair_loss(open_clip.ClipLoss(), num_pairs=100_000, num_groups=GROUPS)
    mining_alone = build_fair_loss(open_clip.ClipLoss(), num_pairs=100_000, fairness=False)
    fairness_alone = build_fair_loss(open_clip.ClipLoss(), mining=False, num_groups=GROUPS)
    for module in (fair_loss, mining_alone, fairness_alone):
        module.to(device)
    distance = SamplesLoss("sinkhorn", p=2, blur=1e-4)

    def finish(total: torch.Tensor) -> None:
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    def plain() -> None:
        finish(plain_loss(**model(images, texts)))

    def fair() -> None:
        finish(fair_loss(**model(images, texts), pair_ids=ids, groups=groups))

    def scores(out: dict[str, torch.Tensor]) -> torch.Tensor:
        pairs = out["image_features"] * out["text_features"]
        return (out["logit_scale"] * pairs.sum(1))[:, None]

    def published() -> None:
        out = model(images, texts)
        total = plain_loss(**out)
        for _ in range(sum(GROUPS)):
            with torch.no_grad():
                other = model(images, texts)
            total = total + 1e-7 * distance(scores(out), scores(other))
        finish(total)

    with torch.no_grad():
        features = {name: value.clone() for name, value in model(images, texts).items()}

    def loss_alone(loss: torch.nn.Module, **beside: torch.Tensor) -> None:
        loss(**{k: v.requires_grad_() for k, v in features.items()}, **beside).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    where = conditions() | {"batch_size": count, "device": _name(device)}
    runs = {"plain": plain, "fair": fair}
    if not options.skip_published:
        runs["published scheme"] = published
    steps = interleaved(runs, rounds=options.rounds, most_seconds=900.0)
    beside = {"pair_ids": ids, "groups": groups}
    losses = {
        "plain": lambda: loss_alone(plain_loss),
        "with mining": lambda: loss_alone(mining_alone, pair_ids=ids),
        "with the fairness term": lambda: loss_alone(fairness_alone, groups=groups),
        "with both": lambda: loss_alone(fair_loss, **beside),
    }
    alone = interleaved(losses, rounds=200)
    rows: list[dict[str, object]] = []
    for name, taken in steps.items():
        ratio = paired(steps, name, "plain")
        rows.append({"step": name, **taken, "of_plain": ratio})
        print(
            f"step {name:24s} {taken['median_s']:9.4f} s (quartiles {taken['iqr_s']:.4f} apart), "
            f"processor {taken['cpu_median_s']:9.4f} s: {ratio['ratio']:.4f} of plain, "
            f"{ratio['cpu_ratio']:.4f} of its processor time"
        )
    base = steps["plain"]
    for name, taken in alone.items():
        del taken["all_s"], taken["cpu_all_s"]
        extra = {
            kind: taken[f"{kind}median_s"] - alone["plain"][f"{kind}median_s"]
            for kind in ("", "cpu_")
        }
        share = {f"{kind}percent": 100 * extra[kind] / base[f"{kind}median_s"] for kind in extra}
        rows.append({"loss_alone": name, **taken, "added": extra, "of_a_plain_step": share})
        print(
            f"loss {name:24s} {1e3 * taken['median_s']:9.3f} ms, processor "
            f"{1e3 * taken['cpu_median_s']:.3f} ms: adds {1e3 * extra['cpu_']:.3f} ms, "
            f"{share['cpu_percent']:.4f} % of a plain step"
        )
    name = f"training_step_{options.model}_{count}_{device.type}_{options.threads}_threads"
    print(save(name, __doc__.split("\n\n")[0], rows, where))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
