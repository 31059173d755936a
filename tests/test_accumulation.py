"""Gradient accumulation in open_clip's own loop: 4 x 16 is 1 x 64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from open_clip.loss import ClipLoss, CoCaLoss, SigLipLoss
from torch import nn

from fairclip_losses import BadPairMiner, FairLoss, SinkhornFairnessLoss

host = pytest.importorskip("open_clip_train.train")

PAIRS, STEP, EPOCHS = 128, 64, 3
SCALARS = {"logit_scale", "logit_bias"}


class Tables(nn.Module):
    """Features looked up by the pair's number: the same bits in whatever batch it comes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.image, self.text = nn.Embedding(PAIRS, 8), nn.Embedding(PAIRS, 8)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, images, texts):
        return {
            "image_features": nn.functional.normalize(self.image(images.long()), dim=-1),
            "text_features": nn.functional.normalize(self.text(texts), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


class BiasedTables(Tables):
    def forward(self, images, texts):
        return super().forward(images, texts) | {"logit_bias": 1.0 * self.logit_bias}


class CaptioningTables(Tables):
    """With a captioning head, and captions of one to four tokens."""

    def __init__(self):
        super().__init__()
        self.caption = nn.Embedding(PAIRS, 4 * 9)

    def forward(self, images, texts):
        tokens = 1 + (texts[:, None] + torch.arange(4)) % 8
        return super().forward(images, texts) | {
            "logits": self.caption(texts).view(-1, 4, 9),
            "labels": tokens.masked_fill(torch.arange(4) > texts[:, None] % 4, 0),
        }


class Loader(list):
    num_samples = PAIRS

    @property
    def num_batches(self):
        return len(self)


class WithMetadata(nn.Module):
    """The fair loss as the loop calls it: ids and groups of the step's pairs beside the model's."""

    def __init__(self, fair, accum_freq):
        super().__init__()
        self.fair, self.accum_freq, self.calls = fair, accum_freq, 0

    def forward(self, **inputs):
        step, turn = divmod(self.calls, self.accum_freq)
        ids = torch.arange(STEP) + step % (PAIRS // STEP) * STEP
        self.calls += 1
        last = turn == self.accum_freq - 1
        return self.fair(**inputs, pair_ids=ids, groups=ids % 3 - 1, record=last)


def run(kind, accum_freq, fair):
    """Train at a learning rate of 0; return the gradients of every step and the fair loss."""
    model, base = {
        "clip": lambda: (Tables(), ClipLoss()),
        "siglip": lambda: (BiasedTables(), SigLipLoss()),
        "coca": lambda: (CaptioningTables(), CoCaLoss(2.0, 1.0)),
    }[kind]()
    loss = base
    if fair:
        loss = FairLoss(
            base,
            BadPairMiner(PAIRS, faulty_sigma=0.9, noisy_sigma=0.9),
            SinkhornFairnessLoss(num_groups=2, queue_size=5),
            0.7,
            normalization="weights",
        )
    called = WithMetadata(loss, accum_freq) if fair else loss
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    grads = []
    optimizer.register_step_pre_hook(
        lambda *_: grads.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )
    )
    batches = Loader((rows.float(), rows) for rows in torch.arange(PAIRS).split(STEP // accum_freq))
    data = {"train": SimpleNamespace(dataloader=batches, set_epoch=lambda epoch: None)}
    args = SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=accum_freq, skip_scheduler=True,
        grad_clip_norm=None, horovod=False, rank=0, local_rank=0, log_local=False,
        log_every_n_steps=100, batch_size=STEP // accum_freq, world_size=1, wandb=False,
    )  # fmt: skip
    for epoch in range(EPOCHS):
        host.train_one_epoch(model, data, called, epoch, optimizer, None, None, None, args)
        if fair:
            loss.end_epoch()
    return grads, loss


def towers_error(one, other):
    """Largest difference of the towers' gradients, beside the largest of them."""
    return max(
        float((one[name] - other[name]).abs().max() / one[name].abs().max())
        for name in one.keys() - SCALARS
    )


@pytest.mark.parametrize("kind", ["clip", "siglip", "coca"])
def test_four_times_sixteen_is_once_sixty_four(kind):
    whole, fair = run(kind, 1, fair=True)
    parts, fair_in_parts = run(kind, 4, fair=True)
    plain_whole, _ = run(kind, 1, fair=False)
    plain_parts, _ = run(kind, 4, fair=False)

    report = fair.miner.report()
    assert report.visits.tolist() == [EPOCHS] * PAIRS
    assert set(report.kind) == {"clean", "noisy", "faulty"}
    for name, value in fair.state_dict().items():
        if isinstance(value, torch.Tensor):
            found = fair_in_parts.state_dict()[name]
            assert torch.equal(found.nan_to_num(-1.0), value.nan_to_num(-1.0)), name

    assert len(whole) == len(parts) == EPOCHS * PAIRS // STEP
    assert towers_error(whole[-1], plain_whole[-1]) > 0.05  # the fair parts do something
    eps = torch.finfo(torch.float32).eps
    for step in range(len(whole)):
        upstreams = towers_error(plain_whole[step], plain_parts[step])
        assert upstreams < 1e-5
        assert towers_error(whole[step], parts[step]) <= 2 * max(upstreams, 2 * eps)
        # open_clip counts the gradient of the scale (and bias) once a pass; ours goes with it.
        for name in whole[step].keys() & SCALARS:
            for once, often in ((plain_whole, plain_parts), (whole, parts)):
                torch.testing.assert_close(often[step][name], 4 * once[step][name])
