"""What the processes of test_distributed.py do; each function runs in every one of them.

Without pytest, so that a process starts quickly.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import itertools
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairclip_losses import BadPairMiner, FairLoss, SinkhornFairnessLoss
from fairclip_losses.functional import (
    caption_pair_losses,
    clip_pair_losses,
    distill_pair_losses,
)
from fairclip_losses.pair_terms import PairTerms, pair_terms

PAIRS, BATCH, STEPS, VOCABULARY, OWN_EPOCHS = 32, 16, 4, 7, 5

# ------------------------------ training


class Towers(nn.Module):
    """Two linear towers, a captioning head, and what the four losses want of a model."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.image, self.text = nn.Linear(6, 5), nn.Linear(6, 5)
        self.caption = nn.Linear(6, 3 * VOCABULARY)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.logit_bias = nn.Parameter(torch.tensor(-1.0))

    def forward(self, image, text, tokens):
        # Every parameter takes part in every loss, as DistributedDataParallel expects.
        image_features = self.image(image) + 0.0 * (self.logit_bias + self.caption(image).sum())
        out = {
            "image_features": F.normalize(image_features, dim=-1),
            "text_features": F.normalize(self.text(text), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }
        if self.kind == "siglip":
            out["logit_bias"] = 1.0 * self.logit_bias
        if self.kind == "coca":
            out["logits"] = self.caption(image).view(-1, 3, VOCABULARY)
            out["labels"] = tokens
        if self.kind == "distill":
            out |= {
                "dist_image_features": F.normalize(image[:, :5], dim=-1),
                "dist_text_features": F.normalize(text[:, :5], dim=-1),
                "dist_logit_scale": torch.tensor(3.0),
            }
        return out


SIGLIP_FORMS = ("bidir", "shift", "reduce", "gather")
HAS_FORMS = "dist_impl" in inspect.signature(SigLipLoss).parameters
if not HAS_FORMS:  # the oldest versions know two of them
    SIGLIP_FORMS = ("bidir", "shift")


def base_loss(kind, local_loss, gather_with_grad, rank, world_size):
    """Build open_clip's loss; of SigLIP ``gather_with_grad`` names the form."""
    place = {"rank": rank, "world_size": world_size}
    if kind == "siglip":
        form = gather_with_grad if world_size > 1 else "bidir"
        return SigLipLoss(
            **place, **({"dist_impl": form} if HAS_FORMS else {"bidir": form == "bidir"})
        )
    common = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, **place}
    if kind == "coca":
        return CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, **common)
    return (DistillClipLoss if kind == "distill" else ClipLoss)(**common)


class FixedKeys(nn.Module):
    """The three losses in one process as local_loss without gather_with_grad differentiates them.

    Each pair is compared with all others' features as with constants.
    """

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, output_dict=True, **model_out):
        return {name: terms.mean() for name, terms in self.pair_terms(**model_out).named.items()}

    def pair_terms(self, image_features, text_features, logit_scale, **rest):
        def sides(image, text, scale):
            return scale * image @ text.detach().t(), scale * text @ image.detach().t()

        per_image, per_text = sides(image_features, text_features, logit_scale)
        own = torch.arange(len(per_image))
        named = {"contrastive_loss": clip_pair_losses(per_image, per_text, own)}
        if self.kind == "coca":
            named["caption_loss"] = 2.0 * caption_pair_losses(rest["logits"], rest["labels"])
        if self.kind == "distill":
            teacher = sides(*(rest[f"dist_{side}"] for side in
                              ("image_features", "text_features", "logit_scale")))  # fmt: skip
            named["distill_loss"] = distill_pair_losses(teacher[0], per_image, teacher[1], per_text)
        return PairTerms(named["contrastive_loss"], named)


# The fair parts: mining, fairness, normalization, score.
NO_PART = (False, False, "batch", "loss")
MINING = (True, False, "batch", "loss")
FAIRNESS = (False, True, "batch", "loss")
BOTH = (True, True, "weights", "similarity")


def fair_loss(base, part):
    miner, fairness, normalization, score = part
    return FairLoss(
        base,
        BadPairMiner(PAIRS, faulty_sigma=0.7, noisy_sigma=1.0) if miner else None,
        SinkhornFairnessLoss(num_groups=(2, 3), queue_size=3) if fairness else None,
        0.5,
        score,
        normalization=normalization,
    )


def data():
    generator = torch.Generator().manual_seed(5)
    images, texts = torch.randn(2, PAIRS, 6, generator=generator)
    tokens = torch.randint(1, VOCABULARY, (PAIRS, 3), generator=generator)
    groups = torch.stack(
        [torch.randint(-1, 2, (PAIRS,), generator=generator),
         torch.randint(-1, 3, (PAIRS,), generator=generator)], 1
    )  # fmt: skip
    groups[: BATCH // 2] = -1  # whole processes without a known group
    groups[BATCH:, 1] = 2  # an attribute of one group alone, ...
    groups[BATCH + 5 :, 1] = -1  # which the last processes do not have
    return images, texts, tokens, groups


def train(kind, part, rank, world_size, local_loss=False, gather_with_grad=True, alike=None):
    """Train STEPS steps in this process; return the weights, the losses and the state.

    ``alike``, in one process: what it is to equal of processes as many as it says, one of
    ("exact", W); ("features", W): the features' gradients are 1/W; ("keys", W): `FixedKeys`.
    """
    images, texts, tokens, groups = data()
    model = Towers(kind)
    if world_size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    form, count = alike or ("exact", 1)
    base = base_loss(kind, local_loss, gather_with_grad, rank, world_size)
    if form == "keys":
        base = FixedKeys(kind)
    loss = fair_loss(base, part)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    values = []
    local = BATCH // world_size
    for step in range(STEPS):
        start = step % 2 * BATCH + rank * local
        rows = torch.arange(start, start + local)
        out = model(images[rows], texts[rows], tokens[rows])
        if form == "features":
            for side in ("image_features", "text_features"):
                out[side].register_hook(lambda grad: grad / count)
        terms = loss(**out, pair_ids=rows, groups=groups[rows], output_dict=True)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        values.append({name: float(value.detach()) for name, value in terms.items()})
        if step == 1:
            loss.end_epoch()
    inner = getattr(model, "module", model)
    state = {k: v for k, v in loss.state_dict().items() if isinstance(v, torch.Tensor)}
    return {k: v.detach().clone() for k, v in inner.state_dict().items()}, values, state


def uneven_captions(rank, world_size):
    """Gradients of CoCa where the processes' captions have different numbers of tokens."""
    images, texts, tokens, _ = data()
    local = BATCH // world_size
    for row in range(BATCH):
        tokens[row, 1 + (row // local) % 2 :] = 0  # one token or two
    model = Towers("coca")
    rows = torch.arange(rank * local, (rank + 1) * local)
    base = base_loss("coca", False, True, rank, world_size)
    loss = FairLoss(base, BadPairMiner(PAIRS))
    loss.miner.memory.kind.fill_(2)
    loss.miner.memory.mean.fill_(2.0)
    loss.miner.memory.std.fill_(0.5)
    out = model(images[rows], texts[rows], tokens[rows])
    loss(**out, pair_ids=rows, output_dict=True)["caption_loss"].backward()
    grad = model.caption.weight.grad
    dist.all_reduce(grad)
    return grad / world_size, loss.last.weights


# ------------------------------ exchanges


@contextmanager
def counted_exchanges():
    """Count the exchanges of this process by name."""
    names = ("all_gather", "all_reduce", "broadcast", "batch_isend_irecv", "reduce_scatter")
    counts, originals = Counter(), {name: getattr(dist, name) for name in names}

    def counting(name):
        def call(*args, **options):
            counts[name] += 1
            return originals[name](*args, **options)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name in names:
            setattr(dist, name, originals[name])


def batch(rank, world_size, count=4):
    """A batch of ClipLoss in this process."""
    generator = torch.Generator().manual_seed(rank)
    image, text = F.normalize(torch.randn(2, count, 5, generator=generator), dim=-1)
    ids = torch.arange(count) + rank * count
    return {
        "image_features": image.requires_grad_(),
        "text_features": text.requires_grad_(),
        "logit_scale": torch.tensor(5.0),
        "pair_ids": ids,
        "groups": {"a": ids % 2, "b": ids % 3},
        "output_dict": True,
    }


def exchanges(rank, world_size):
    """The exchanges of a step of open_clip's loss alone, and of the fair loss by kind of batch."""
    base = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    with counted_exchanges() as alone:
        made = batch(rank, world_size)
        base(
            *(made[name] for name in ("image_features", "text_features", "logit_scale"))
        ).backward()
    loss = FairLoss(
        base,
        BadPairMiner(PAIRS, faulty_sigma=0.5),
        SinkhornFairnessLoss(num_groups={"a": 2, "b": 3}, queue_size=2),
    )
    loss(**batch(rank, world_size))
    found = []
    for kind in ("plain", "no group here", "one id", "not finite here", "flagged"):
        made = batch(rank, world_size)
        if kind == "no group here" and rank == 0:
            made["groups"] = {name: torch.full_like(g, -1) for name, g in made["groups"].items()}
        if kind == "one id":
            made["pair_ids"] = torch.zeros(4, dtype=torch.int64)
        if kind == "not finite here" and rank == 0:
            made["image_features"] = torch.full((4, 5), torch.nan, requires_grad=True)
        if kind == "flagged":
            flagged = loss.end_epoch().faulty
        with counted_exchanges() as counts:
            sum(loss(**made).values()).backward()
        found.append(counts)
    return alone, found, flagged


# ------------------------------ SigLIP


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return result


def siglip_memory(rank, world_size):
    """By form: the largest tensor of both passes of the per-pair terms, and what waits between."""
    found = {}
    for form in SIGLIP_FORMS:
        out = {name: part for name, part in batch(rank, world_size, 32).items() if "_" in name}
        out["logit_bias"] = torch.tensor(-1.0)
        loss = base_loss("siglip", False, form, rank, world_size)
        saved = []
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: (saved.append(tensor.numel()), tensor)[1],
            lambda tensor: tensor,
        )
        with Largest() as largest:
            with keep:
                terms = pair_terms(loss, out).contrastive
            terms.sum().backward()
        found[form] = largest.numbers, sum(saved)
    return found


def siglip_gradients(rank, world_size):
    """By form and precision: the largest differences from open_clip's own loss and gradients."""
    found = {}
    for form in SIGLIP_FORMS:
        loss = base_loss("siglip", False, form, rank, world_size)
        for kind in ("double", "autocast"):
            dtype = torch.float64 if kind == "double" else torch.float32
            sides = []
            for mine in (False, True):
                made = batch(rank, world_size, 8)
                leaves = [made["image_features"], made["text_features"], torch.tensor(5.0),
                          torch.tensor(-1.0)]  # fmt: skip
                leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
                names = ("image_features", "text_features", "logit_scale", "logit_bias")
                out = dict(zip(names, leaves, strict=True))
                with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                    total = pair_terms(loss, out).contrastive.mean() if mine else loss(**out)
                total.backward()
                numbers = torch.stack([total.detach(), leaves[2].grad, leaves[3].grad])
                dist.all_reduce(numbers)  # these are each process's share
                sides.append([numbers, leaves[0].grad, leaves[1].grad])
            found[form, kind] = max(
                float(((one - other).abs() / one.abs().max()).max())
                for one, other in zip(*sides, strict=True)
            )
    return found


# ------------------------------ a loss of one's own


class Silent(nn.Module):
    """A loss with terms that does not say which process it is in."""

    def pair_terms(self, image_features, text_features, logit_scale):
        terms = (image_features - text_features).square().sum(1)
        return PairTerms(terms, {"contrastive_loss": terms})


def own_loss(rank, world_size):
    """Train the example; return what a loss is told that does not know its process."""
    model, loss, _ = own_example().train(OWN_EPOCHS, rank, world_size)
    state = {k: v for k, v in loss.state_dict().items() if isinstance(v, torch.Tensor)}
    refusal = None
    silent, made = Silent(), batch(rank, world_size)
    try:
        FairLoss(silent, BadPairMiner(PAIRS))(**made)
    except ValueError as error:
        refusal = str(error)
    silent.world_size = 1
    FairLoss(silent, BadPairMiner(PAIRS))(**made)
    return getattr(model, "module", model).state_dict(), state, refusal


# ------------------------------ losses of other processes than there are


class OwnTerms(ClipLoss):
    """A subclass with terms of its own: world_size=1 is only its default."""

    def pair_terms(self, image_features, text_features, logit_scale):
        terms = (image_features - text_features).square().sum(1)
        return PairTerms(terms, {"contrastive_loss": terms})


def misplaced(rank, world_size):
    """By loss: what is said of it in a process that it is not built for, and by its remedy."""
    losses = {
        "clip": ClipLoss(),
        "siglip": SigLipLoss(),
        "coca": CoCaLoss(1.0, 1.0),
        "distill": DistillClipLoss(),
        "own terms": OwnTerms(),
        "next rank": ClipLoss(rank=(rank + 1) % world_size, world_size=world_size),
        "more": ClipLoss(rank=rank, world_size=world_size + 1),
    }
    made, found = batch(rank, world_size), {}
    for name, base in losses.items():
        for parts in ((BadPairMiner(PAIRS),), (None, SinkhornFairnessLoss(num_groups={"a": 2}))):
            try:
                FairLoss(base, *parts)(**made)
            except ValueError as error:
                found.setdefault(name, []).append(str(error))
    arguments = {name: made[name] for name in ("image_features", "text_features", "logit_scale")}
    alone = torch.equal(FairLoss(ClipLoss())(**arguments), ClipLoss()(**arguments))
    base = eval(found["clip"][0].partition("build it as ")[2])
    loss = FairLoss(base, BadPairMiner())
    loss(**made)
    return found, alone, loss.miner.report().ids


class Learnt(nn.Module):
    """A loss with a parameter, of each process's own pairs alone."""

    world_size = 1

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def pair_terms(self, image_features, text_features, logit_scale):
        terms = self.scale * (image_features - text_features).square().sum(1)
        return PairTerms(terms, {"contrastive_loss": terms})


class Holds(nn.Module):
    """A model that holds its loss, as a LightningModule does."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, **made):
        return self.loss(**made)


def broadcast(rank, world_size):
    """Whether what each process remembers by itself is its own, wrapped by itself or in a model."""
    same = []
    for wrap, num_pairs in itertools.product((lambda loss: loss, Holds), (PAIRS, None)):
        fairness = SinkhornFairnessLoss(num_groups={"a": 2, "b": 3}, queue_size=3)
        plain = FairLoss(Learnt(), BadPairMiner(num_pairs), fairness)
        plain(**batch(rank, world_size, 2 + rank))  # memories of several sizes
        plain.end_epoch()
        loss = copy.deepcopy(plain)
        wrapped = nn.parallel.DistributedDataParallel(wrap(loss), broadcast_buffers=True)
        for _ in range(2):
            made = batch(rank, world_size)
            sum(wrapped(**made).values()).backward()
            plain(**made)
        state = loss.state_dict()
        same += [
            torch.equal(value.nan_to_num(7.0), state[name].nan_to_num(7.0))
            for name, value in plain.state_dict().items()
            if isinstance(value, torch.Tensor)
        ]
    return same


def own_example():
    path = Path(__file__).parents[1] / "examples" / "own_loss.py"
    spec = importlib.util.spec_from_file_location("own_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def everything(rank, world_size, cases):
    return {
        "training": [train(*case[:2], rank, world_size, *case[2:]) for case in cases],
        "captions": uneven_captions(rank, world_size),
        "exchanges": exchanges(rank, world_size),
        "siglip": siglip_memory(rank, world_size),
        "siglip gradients": siglip_gradients(rank, world_size),
        "own": own_loss(rank, world_size),
        "misplaced": misplaced(rank, world_size),
        "broadcast": broadcast(rank, world_size),
    }
