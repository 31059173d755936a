"""What does the fair loss add to a whole training step, and to what the published scheme adds?

    python examples/benchmarks/training_step.py [--model ViT-B-32] [--batch-size 64] [--threads 4]

One optimizer step (forward, loss, backward, AdamW) of an open_clip model on random images and
texts: plain, with FairLoss (mining and fairness over two attributes of 3 and 2 groups), and by the
scheme of the published code: one further forward pass without gradients for each group, of a
batch's size, and geomloss on the scores. A step of a large model varies by more than the fair loss
costs, so the losses are timed by themselves too, forward and backward from the features, and what
FairLoss adds there is given as a part of the plain step.
"""

from __future__ import annotations

import argparse

import open_clip
import torch
from geomloss import SamplesLoss
from method import conditions, interleaved, save

from fairclip_losses import build_fair_loss

GROUPS = (3, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
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
    fair_loss.to(device)
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

    where = conditions()
    runs = {"plain": plain, "fair": fair, "published scheme": published}
    times = interleaved(runs, rounds=options.rounds, most_seconds=600.0)
    losses = {
        "loss alone, plain": lambda: loss_alone(plain_loss),
        "loss alone, fair": lambda: loss_alone(fair_loss, pair_ids=ids, groups=groups),
    }
    alone = interleaved(losses, rounds=50)
    times |= alone
    base = times["plain"]["median_s"]
    extra = alone["loss alone, fair"]["median_s"] - alone["loss alone, plain"]["median_s"]
    rows: list[dict[str, object]] = [{"run": name, **taken} for name, taken in times.items()]
    rows.append({"run": "FairLoss in the plain step", "added_percent": 100 * extra / base})
    for name, taken in times.items():
        print(
            f"{name:18s} {taken['median_s']:9.4f} s  (quartiles {taken['iqr_s']:.4f} s apart, "
            f"processor {taken['cpu_median_s']:.4f} s)  {taken['median_s'] / base:.4f} plain steps"
        )
    print(f"FairLoss adds {1e3 * extra:.2f} ms, {100 * extra / base:.3f} % of a plain step")
    name = f"training_step_{options.model}_{count}_{device.type}"
    print(save(name, __doc__.split("\n\n")[0], rows, where))


if __name__ == "__main__":
    main()
