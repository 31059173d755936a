"""FairLoss round a loss of your own: InfoNCE with a margin and label smoothing.

    python examples/own_loss.py
    torchrun --nproc-per-node 2 examples/own_loss.py

The second trains the same weights as the first. In open_clip's training program:

    PYTHONPATH=examples python -m fairclip_losses.train ... --fair-callback own_loss:UseIt
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairclip_losses import BadPairMiner, FairLoss, SinkhornFairnessLoss
from fairclip_losses.distributed import gather_with_gradient
from fairclip_losses.integrations.events import Callback, TrainState
from fairclip_losses.pair_terms import PairTerms


class MarginInfoNCE(nn.Module):
    r"""Contrastive loss whose own pairs are held to a margin, with softened labels.

    .. math:: l_i = \tfrac12 [H(q_i, softmax L_{i:}) + H(q_i, softmax L_{:i})], \quad
              L_{ij} = \tau (v_i \cdot t_j - m [i = j]), \quad q_i = (1 - s) e_i + s / N

    ``pair_terms`` is all that `FairLoss` asks for. To run over several processes a loss needs two
    attributes besides, ``rank`` and ``world_size``: here each process returns the terms of its own
    pairs against the whole batch, and the mean over pairs and processes is the loss.
    """

    def __init__(
        self, margin: float = 0.1, smoothing: float = 0.1, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__()
        self.margin, self.smoothing = margin, smoothing
        self.rank, self.world_size = rank, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        loss = self.pair_terms(image_features, text_features, logit_scale).contrastive.mean()
        return {"contrastive_loss": loss} if output_dict else loss

    def pair_terms(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor
    ) -> PairTerms:
        count = len(image_features)
        own = self.rank * count + torch.arange(count, device=image_features.device)
        sides = (
            logit_scale * image_features @ self._of_all(text_features).t(),
            logit_scale * text_features @ self._of_all(image_features).t(),
        )
        terms = [
            F.cross_entropy(
                logits - logit_scale * self.margin * F.one_hot(own, logits.shape[1]),
                own,
                label_smoothing=self.smoothing,
                reduction="none",
            )
            for logits in sides
        ]
        contrastive = (terms[0] + terms[1]) / 2  # (B,), its mean is the loss
        return PairTerms(contrastive, {"contrastive_loss": contrastive})

    def _of_all(self, features: Tensor) -> Tensor:
        return gather_with_gradient(features, self.rank, self.world_size)


class UseIt(Callback):
    """Trains with this loss in place of open_clip's; the fair loss, if asked for, wraps it."""

    def on_loss_ready(self, state: TrainState) -> None:
        state.loss = MarginInfoNCE(rank=state.args.rank, world_size=state.args.world_size)


PAIRS, BATCH = 256, 64


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(16, 16), nn.Linear(16, 16)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        return {
            "image_features": F.normalize(self.image(images), dim=-1),
            "text_features": F.normalize(self.text(texts), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


def train(epochs: int, rank: int = 0, world_size: int = 1) -> tuple[nn.Module, FairLoss, Tensor]:
    """Train on toy pairs, of which 1 in 16 is mismatched; return model, loss and who is."""
    torch.manual_seed(0)  # every process has the same data and weights
    hidden = torch.randn(PAIRS, 16)
    images, texts = (hidden + 0.3 * torch.randn(PAIRS, 16) for _ in range(2))
    mismatched = torch.arange(PAIRS) % 16 == 0
    texts[mismatched] = texts[mismatched].roll(1, 0)
    groups = (torch.rand(PAIRS) < 0.3).long()

    model: nn.Module = Towers()
    if world_size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    loss = FairLoss(
        MarginInfoNCE(rank=rank, world_size=world_size),
        miner=BadPairMiner(PAIRS, faulty_sigma=1.5, warmup_epochs=3),
        fairness=SinkhornFairnessLoss(num_groups=2),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for ids in torch.randperm(PAIRS).split(BATCH):
            ids = ids.chunk(world_size)[rank]  # this process's part of the batch
            total = loss(**model(images[ids], texts[ids]), pair_ids=ids, groups=groups[ids])
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        loss.end_epoch()
    return model, loss, mismatched


def main() -> None:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    _, loss, mismatched = train(20, rank, world_size)
    if rank == 0:
        flagged = loss.miner.report().kind == "faulty"
        print(
            f"{int(mismatched.sum())} mismatched pairs, flagged {int(flagged.sum())}, "
            f"rightly {int((flagged & mismatched.numpy()).sum())}"
        )
    if world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
