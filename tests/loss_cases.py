"""Batches, losses and parts that the tests of the losses share; not a test file."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from torch import nn

from fairclip_losses import BadPairMiner, FairLoss, SinkhornFairnessLoss
from fairclip_losses.pair_terms import PairTerms

TOKENS, VOCABULARY, PAD = 4, 6, 3
NUM_GROUPS = (3, 2)
PAIRS = 40

BASES = {
    "clip": ClipLoss,
    "siglip": SigLipLoss,
    "coca": lambda: CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=0.5, pad_id=PAD),
    "distill": DistillClipLoss,
}


def model_output(kind="clip", count=10, dim=8, seed=0, dtype=torch.float32, scale=10.0):
    """What the model of that loss gives, every floating point tensor a leaf with a gradient."""
    draw = torch.Generator().manual_seed(seed)

    def leaf(values):
        return values.to(dtype).requires_grad_()

    def features():
        return leaf(F.normalize(torch.randn(count, dim, generator=draw), dim=1))

    output = {
        "image_features": features(),
        "text_features": features(),
        "logit_scale": leaf(torch.tensor(scale)),
    }
    if kind == "siglip":
        output["logit_bias"] = leaf(torch.tensor(-3.0))
    if kind == "coca":
        labels = torch.randint(0, VOCABULARY, (count, TOKENS), generator=draw)
        labels[:1, :1] = 1  # one token at least is no padding
        logits = leaf(torch.randn(count, TOKENS, VOCABULARY, generator=draw))
        output |= {"logits": logits, "labels": labels}
    if kind == "distill":
        output |= {"dist_image_features": features(), "dist_text_features": features()}
        output["dist_logit_scale"] = leaf(torch.tensor(5.0))
    return output


def gradients_of(value, output):
    """The gradients of a scalar in every leaf, zeros where there is none."""
    leaves = [x for x in output.values() if x.requires_grad]
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def group_codes(count, num_groups=NUM_GROUPS, draw=None):
    """Codes (B, C), -1 (unknown) among them."""
    draw = draw or torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(-1, g, (count,), generator=draw) for g in num_groups], 1)


def metadata(count=10, seed=0):
    """Ids, each once, and groups of a batch."""
    draw = torch.Generator().manual_seed(seed)
    groups = group_codes(count, draw=draw)
    return {"pair_ids": torch.randperm(PAIRS, generator=draw)[:count], "groups": groups}


def parts(kind="clip", num_pairs=PAIRS, validate=None, history="mean", **options):
    """A loss with both parts, at their defaults but for a queue."""
    miner = BadPairMiner(num_pairs, validate=validate, history=history)
    fairness = SinkhornFairnessLoss(num_groups=NUM_GROUPS, queue_size=4, validate=validate)
    return FairLoss(BASES[kind](), miner, fairness, **options)


def assert_same_memory(one, other):
    """Hold the state dicts of two modules to each other, to the bit."""
    found, expected = one.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype, name
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)
        else:
            assert found[name] == value


class LoopMiner:
    """The same method with dictionaries and Python floats, one pair at a time."""

    def __init__(self, **options):
        self.warmup_epochs, self.history, self.weighting, self.record = 1, "mean", "relative", "raw"
        vars(self).update(options)  # those of BadPairMiner
        self.log = {}  # id -> [(epoch, loss)]
        self.kinds, self.near = {}, set()
        self.epoch, self.mean, self.std = 0, 0.0, 0.0

    def weight(self, pair, loss):
        if self.kinds.get(pair, "clean") == "clean" or not math.isfinite(loss):
            return 1.0
        weight = math.exp(-0.5 * ((loss - self.mean) / self.std) ** 2)
        if self.weighting == "density":
            weight /= self.std * math.sqrt(2 * math.pi)
        return max(weight, 2.0**-126)

    def visit(self, ids, losses):
        weights = [self.weight(pair, loss) for pair, loss in zip(ids, losses, strict=True)]
        for pair, loss, weight in zip(ids, losses, weights, strict=True):
            if math.isfinite(loss):
                stored = loss * weight if self.record == "weighted" else loss
                self.log.setdefault(pair, []).append((self.epoch, stored))
        return weights

    def histories(self):
        result = {}
        for pair, visits in self.log.items():
            weights = [1 + epoch if self.history == "linear" else 1 for epoch, _ in visits]
            divisor = sum(weights)
            if self.history == "linear" and not self.renormalize:
                divisor = len(visits) * self.total_epochs
            total = sum(w * loss for w, (_, loss) in zip(weights, visits, strict=True))
            result[pair] = total / divisor
        return result

    def end_epoch(self):
        histories = self.histories()
        self.epoch += 1
        self.kinds, self.near = {}, set()
        if not histories:
            return
        values = list(histories.values())
        self.mean = sum(values) / len(values)
        self.std = math.sqrt(sum((m - self.mean) ** 2 for m in values) / len(values))
        if self.epoch < self.warmup_epochs or self.std <= 2.0**-20 * abs(self.mean):
            return
        low = self.mean - self.noisy_sigma * self.std
        high = self.mean + self.faulty_sigma * self.std
        for pair, m in histories.items():
            if m >= high:
                self.kinds[pair] = "faulty"
            elif m <= low:
                self.kinds[pair] = "noisy"
            if min(abs(m - low), abs(m - high)) < 1e-5:
                self.near.add(pair)


class Fixed(nn.Module):
    """Stands for a miner that has flagged pairs: weights by pair id."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def forward(self, pair_losses, pair_ids, *, record=None):
        return self.weights[pair_ids]


class OwnLoss(nn.Module):
    """The squares of what it is given, under the names it is given."""

    def __init__(self, *named):
        super().__init__()
        self.named = named or ("distance_loss",)

    def forward(self, distances, output_dict=False):
        value = distances.square().mean()
        return {"distance_loss": value} if output_dict else value

    def pair_terms(self, distances):
        each = distances.square()
        return PairTerms(each, dict.fromkeys(self.named, each))
