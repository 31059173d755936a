"""One training of the study, in this process: a tiny CLIP on a planted data set.

The model is the demo's (`examples/digits/vit_tiny`), with the vocabulary cut to the captions'
words; the optimiser, schedule and augmentation are open_clip's. A method brings the loss.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from data import PROMPTS, Condition, Split, make_splits
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from fairclip_losses import FairLoss, metrics

CONFIG = Path(__file__).resolve().parents[1] / "digits" / "vit_tiny" / "open_clip_config.json"
WARMUP_STEPS = 20
GROUPS = 2


@dataclass(frozen=True)
class TrainingData:
    """What a training reads: the splits, and captions and prompts as tokens of a small vocabulary.

    ``tokens`` (K, L) are the distinct captions, ``caption`` (N,) the training pairs' rows of them.
    """

    splits: dict[str, Split]
    tokens: Tensor
    caption: Tensor
    prompts: Tensor
    vocabulary: int

    @property
    def wrong(self) -> Tensor:
        """Which training captions are wrong, (N,) bool."""
        train = self.splits["train"]
        return train.digit != train.caption_digit

    @classmethod
    def of(cls, condition: Condition, seed: int) -> TrainingData:
        """Plant the data of a condition by a seed."""
        splits = make_splits(condition, seed)
        texts = sorted({*splits["train"].captions, *PROMPTS})
        tokens = SimpleTokenizer(context_length=16)(texts)
        tokens = tokens[:, : int((tokens != 0).sum(1).max())]
        # In their order: open_clip finds a text's end by the largest token.
        known = torch.unique(tokens)
        tokens = torch.searchsorted(known, tokens.contiguous())
        row = {text: i for i, text in enumerate(texts)}
        return cls(
            splits,
            tokens,
            torch.tensor([row[text] for text in splits["train"].captions]),
            torch.tensor([row[text] for text in PROMPTS]),
            len(known),
        )


@dataclass(frozen=True)
class Settings:
    """The plain training's own settings: what a baseline is tuned by."""

    epochs: int = 36
    learning_rate: float = 1e-3
    weight_decay: float = 0.2
    patch_dropout: float = 0.0


@dataclass(frozen=True)
class Run:
    """What a method is told: the data, the epochs, and a seed for draws of its own."""

    data: TrainingData
    epochs: int
    seed: int


MakeLoss = Callable[[Run], FairLoss]
# Rows of an epoch's batches, (steps, B), of the run, the batch size and a generator.
Sampler = Callable[[Run, int, torch.Generator], Tensor]


def uniform_batches(run: Run, size: int, draw: torch.Generator) -> Tensor:
    """Return every pair once, in random order, the last short batch left out."""
    count = len(run.data.caption)
    return torch.randperm(count, generator=draw)[: count // size * size].view(-1, size)


def train(
    condition: Condition,
    seed: int,
    make_loss: MakeLoss,
    batches: Sampler = uniform_batches,
    settings: Settings | None = None,
) -> dict[str, float]:
    """Train once and return the metrics on the test split, and of the bad pairs found.

    The seed decides the data, the initial weights, the batches and the crops, whatever the method:
    two methods of one seed differ in what they do alone.
    """
    settings = settings or Settings()
    started = time.perf_counter()
    data = TrainingData.of(condition, seed)
    run = Run(data, settings.epochs, seed)
    torch.manual_seed(seed)
    model = _model(data, settings)
    loss = make_loss(run)
    optimiser = _optimiser(model, settings)
    draw = torch.Generator().manual_seed(seed + 77)
    images = _normalised(data.splits["train"].images)
    group = data.splits["train"].group
    size = condition.batch_size
    steps = len(images) // size
    step = 0
    for _ in range(settings.epochs):
        for rows in batches(run, size, draw):
            for part in optimiser.param_groups:
                part["lr"] = _rate(step, steps * settings.epochs, settings.learning_rate)
            batch = _crops(images[rows], draw) if condition.augment else images[rows]
            distinct, place = torch.unique(data.caption[rows], return_inverse=True)
            value = loss(
                image_features=F.normalize(model.encode_image(batch.expand(-1, 3, -1, -1)), dim=-1),
                text_features=F.normalize(model.encode_text(data.tokens[distinct]), dim=-1)[place],
                logit_scale=model.logit_scale.exp(),
                pair_ids=rows,
                groups=group[rows],
            )
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            step += 1
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
        loss.end_epoch()
    seconds = time.perf_counter() - started
    found = {f"val_{name}": value for name, value in _scores(model, data, "val").items()}
    found |= _scores(model, data, "test")
    found |= _detection(loss, data)
    return {name: round(float(value), 5) for name, value in found.items()} | {
        "seconds": round(seconds, 1)
    }


def _model(data: TrainingData, settings: Settings) -> nn.Module:
    config: dict[str, Any] = json.loads(CONFIG.read_text(encoding="utf-8"))["model_cfg"]
    config["text_cfg"] |= {"vocab_size": data.vocabulary, "context_length": data.tokens.shape[1]}
    config["vision_cfg"]["patch_dropout"] = settings.patch_dropout
    return CLIP(**config)


def _optimiser(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Return AdamW as open_clip sets it up: no decay of biases, norms and the scale."""
    named = list(model.named_parameters())
    plain = [p for name, p in named if p.ndim < 2 or "ln" in name or "logit_scale" in name]
    kept = {id(p) for p in plain}
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {
            "params": [p for _, p in named if id(p) not in kept],
            "weight_decay": settings.weight_decay,
        },
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-6)


def _rate(step: int, total: int, peak: float) -> float:
    """Return the learning rate: linear warm-up, then a cosine to 0."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    return peak * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (total - WARMUP_STEPS)))


def _normalised(images: Tensor) -> Tensor:
    return ((images.float() / 255.0 - 0.5) / 0.25)[:, None]


def _crops(images: Tensor, draw: torch.Generator) -> Tensor:
    """Return random resized crops of 90 to 100 % of the area, ratio 3/4 to 4/3, as open_clip's."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(images)).uniform_(low, high, generator=draw)

    area, ratio = uniform(0.9, 1.0), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = ((area * r).sqrt().clamp(max=1.0) for r in (ratio, 1 / ratio))
    window = torch.zeros(len(images), 2, 3)
    window[:, 0, 0], window[:, 1, 1] = width, height
    window[:, 0, 2] = uniform(-1, 1) * (1 - width)
    window[:, 1, 2] = uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(window, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, "bicubic", "border", align_corners=False)


@torch.no_grad()
def _scores(model: Any, data: TrainingData, name: str) -> dict[str, float]:
    """Return AUC, accuracy, their equity-scaled forms and the gaps of a split, zero-shot."""
    model.eval()
    split = data.splits[name]
    text = F.normalize(model.encode_text(data.tokens[data.prompts]), dim=-1)
    images = _normalised(split.images).expand(-1, 3, -1, -1)
    image = F.normalize(model.encode_image(images), dim=-1)
    scores = (model.logit_scale.exp() * image @ text.t()).softmax(-1).double().numpy()
    model.train()
    digit, group = split.digit.numpy(), split.group.numpy()
    right = scores.argmax(1) == digit
    members = [group == code for code in range(GROUPS)]
    auc, accuracy = metrics.roc_auc(digit, scores), right.mean()
    group_auc = [metrics.roc_auc(digit[m], scores[m]) for m in members]
    group_accuracy = [right[m].mean() for m in members]
    return {
        "auc": auc,
        "es_auc": metrics.equity_scaled(auc, group_auc),
        "accuracy": accuracy,
        "es_accuracy": metrics.equity_scaled(accuracy, group_accuracy),
        "minority_auc": group_auc[1],
        "minority_accuracy": group_accuracy[1],
        "dpd": metrics.demographic_parity_difference(scores.argmax(1), group, num_classes=10),
        "deodds": metrics.equalized_odds_difference(digit, scores.argmax(1), group, num_classes=10),
    }


def _detection(loss: FairLoss, data: TrainingData) -> dict[str, float]:
    """Return how well the miner's histories find the wrong captions, and whom its flags hit."""
    report = getattr(loss.miner, "report", lambda: None)()
    if report is None:
        return {}
    wrong, group = data.wrong.numpy()[report.ids], data.splits["train"].group.numpy()[report.ids]
    flagged = report.kind != "clean"
    found = {"bad_auroc": _auroc(wrong, report.history)}
    for code, name in enumerate(("majority", "minority")):
        own = group == code
        found[f"{name}_bad_auroc"] = _auroc(wrong[own], report.history[own])
        found[f"{name}_right_flagged"] = flagged[own & ~wrong].mean()
        found[f"{name}_wrong_flagged"] = flagged[own & wrong].mean() if wrong[own].any() else np.nan
    return found


def _auroc(bad: np.ndarray, score: np.ndarray) -> float:
    """Return the AUROC of a score for the bad pairs, NaN where all pairs or none are bad."""
    return metrics.roc_auc(bad.astype(int), score) if 0 < bad.sum() < len(bad) else float("nan")
