"""The methods that the study compares: this package's, the field's simple ones, and controls."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from training import GROUPS, MakeLoss, Run, Sampler, uniform_batches

from fairclip_losses import BadPairMiner, FairLoss, build_fair_loss
from fairclip_losses.pair_terms import PairTerms, pair_terms


@dataclass(frozen=True)
class Method:
    """One method: the loss that it trains with and how its batches are drawn."""

    make_loss: MakeLoss
    batches: Sampler = uniform_batches


def package(run: Run, **options: Any) -> FairLoss:
    """Return what this package makes of a preset."""
    pairs = len(run.data.caption)
    return build_fair_loss(
        ClipLoss(), num_pairs=pairs, total_epochs=run.epochs, num_groups=GROUPS, **options
    )


def plain(run: Run) -> FairLoss:
    """Return open_clip's loss as it is."""
    return FairLoss(ClipLoss())


class TrueWeights(nn.Module):
    """In the miner's place: the weights that a miner without error would give."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.right = 1.0 - run.data.wrong.float()

    def forward(self, pair_losses: Tensor, ids: Tensor, *, record: bool | None = None) -> Tensor:
        """Return 1 for a right pair and 0 for a wrong one."""
        return self.right[ids].to(pair_losses.dtype)

    def end_epoch(self) -> None:
        """Learn nothing."""


class PermutedWeights(BadPairMiner):
    """Control: the miner's weights, dealt out anew among the pairs after each epoch."""

    def __init__(self, run: Run, mined: FairLoss) -> None:
        assert mined.miner is not None
        super().__init__(**{name: getattr(mined.miner, name) for name in _OPTIONS})
        self.draw = torch.Generator().manual_seed(run.seed + 1)
        self.dealt = torch.ones(len(run.data.caption))

    def forward(self, pair_losses: Tensor, ids: Tensor, *, record: bool | None = None) -> Tensor:
        """Record each pair's own loss, and weigh it by another pair's weight."""
        super().forward(pair_losses, ids, record=record)
        return self.dealt[ids]

    def end_epoch(self) -> Any:
        """Deal out the weights that the pairs of this epoch now have."""
        summary, report = super().end_epoch(), self.report()
        weights = torch.ones_like(self.dealt)
        weights[torch.from_numpy(report.ids)] = torch.from_numpy(report.weight).float()
        self.dealt = weights[torch.randperm(len(weights), generator=self.draw)]
        return summary


_OPTIONS = (
    "num_pairs", "total_epochs", "warmup_epochs", "noisy_sigma", "faulty_sigma", "history",
    "weighting", "detector", "mixture_threshold",
)  # fmt: skip


class LeftOut(nn.Module):
    """Control: in each epoch a random share of the pairs weighs nothing, whatever `miner` says."""

    def __init__(self, run: Run, share: float, miner: nn.Module | None = None) -> None:
        super().__init__()
        self.miner, self.share = miner, share
        self.draw = torch.Generator().manual_seed(run.seed + 2)
        self.pairs = len(run.data.caption)
        self._redraw()

    def _redraw(self) -> None:
        self.kept = torch.rand(self.pairs, generator=self.draw) >= self.share

    def forward(self, pair_losses: Tensor, ids: Tensor, *, record: bool | None = None) -> Tensor:
        """Return the miner's weights, 0 for the pairs left out."""
        weights = torch.ones_like(pair_losses)
        if self.miner is not None:
            weights = self.miner(pair_losses, ids, record=record)
        return weights * self.kept[ids]

    def end_epoch(self) -> Any:
        """Choose whom the next epoch leaves out."""
        self._redraw()
        return None if self.miner is None else self.miner.end_epoch()

    def report(self) -> Any:
        """Return the miner's report."""
        return None if self.miner is None else self.miner.report()


class GroupDro(nn.Module):
    """Group DRO (Sagawa et al. 2020): the groups' mean losses under weights that follow them."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.shares = torch.full((GROUPS,), 1 / GROUPS)
        self.groups: Tensor | None = None

    def pair_terms(self, **model_out: Any) -> PairTerms:
        """Return each pair's loss times its group's weight over the group's share of the batch."""
        groups = model_out.pop("dro_groups")
        losses = pair_terms(ClipLoss(), model_out).contrastive
        members = groups == torch.arange(GROUPS)[:, None]
        counts = members.sum(1).clamp(min=1)
        means = (members * losses.detach()).sum(1) / counts
        self.shares = torch.softmax(self.shares.log() + self.rate * means, 0)
        scale = (self.shares * len(losses) / counts)[groups]
        return PairTerms(losses, {"contrastive_loss": scale * losses})


class MeanGap(nn.Module):
    """A penalty in fairret's manner (Buyl et al. 2024): how far the groups' mean losses lie."""

    def forward(self, scores: Tensor, groups: Tensor, **others: Any) -> Tensor:
        """Return the mean over the groups of |mean of the group - mean of the batch|."""
        self.last = None
        members = (groups == torch.arange(GROUPS)[:, None]).float()
        counts = members.sum(1)
        gaps = ((members * scores).sum(1) / counts.clamp(min=1) - scores.mean()).abs()
        return (gaps * (counts > 0)).mean()

    def remember(self, *given: Any, **others: Any) -> None:
        """Keep nothing."""


class WithGroups(FairLoss):
    """A FairLoss whose base loss is told the groups too."""

    def forward(self, **given: Any) -> Any:
        """Pass the groups on."""
        return super().forward(dro_groups=given["groups"], **given)


def balanced_batches(run: Run, size: int, draw: torch.Generator) -> Tensor:
    """Return as many batches as an epoch has, with as many pairs of one group as of another."""
    group = run.data.splits["train"].group
    steps, half = len(group) // size, size // GROUPS
    drawn = []
    for code in range(GROUPS):
        members = torch.nonzero(group == code).flatten()
        passes = -(-steps * half // len(members))
        order = [members[torch.randperm(len(members), generator=draw)] for _ in range(passes)]
        drawn.append(torch.cat(order)[: steps * half].view(steps, half))
    return torch.cat(drawn, dim=1)


def with_miner(run: Run, miner: nn.Module, **options: Any) -> FairLoss:
    """Return the package's loss of a preset with another module in its miner's place."""
    loss = package(run, **options)
    loss.miner = miner  # type: ignore[assignment]
    return loss


def truth(run: Run, fairness: bool) -> FairLoss:
    """Return the ceiling: the true bad pairs weigh nothing."""
    return with_miner(run, TrueWeights(run), mining=True, fairness=fairness)


def permuted(run: Run) -> FairLoss:
    """Return mining alone with its weights permuted."""
    mined = package(run, fairness=False)
    return with_miner(run, PermutedWeights(run, mined), fairness=False)


def left_out(run: Run, share: float, mining: bool, fairness: bool = False) -> FairLoss:
    """Return a training that leaves out a random share of each epoch's pairs."""
    loss = package(run, fairness=fairness)
    loss.miner = LeftOut(run, share, loss.miner if mining else None)  # type: ignore[assignment]
    return loss


def group_dro(run: Run, mining: bool) -> FairLoss:
    """Return group DRO, with mining or without."""
    # Without mining, a miner that leaves nobody out: the loss then is made of the per-pair terms.
    miner = package(run, fairness=False).miner if mining else LeftOut(run, 0.0)
    return WithGroups(GroupDro(0.01), miner)  # type: ignore[arg-type]


def mean_gap(run: Run) -> FairLoss:
    """Return the penalty of the groups' mean losses."""
    return FairLoss(ClipLoss(), None, MeanGap(), 0.1)  # type: ignore[arg-type]


METHODS = {
    "plain": Method(plain),
    "mining": Method(partial(package, fairness=False)),
    "distance": Method(partial(package, mining=False)),
    "both": Method(package),
    "paper": Method(partial(package, preset="paper")),
    "official": Method(partial(package, preset="official")),
    "threshold mining": Method(
        partial(package, fairness=False, miner_options={"weighting": "relative"})
    ),
    "balanced sampling": Method(plain, balanced_batches),
    "balanced sampling, mining": Method(partial(package, fairness=False), balanced_batches),
    "group DRO": Method(partial(group_dro, mining=False)),
    "group DRO, mining": Method(partial(group_dro, mining=True)),
    "mean gap": Method(mean_gap),
    "permuted weights": Method(permuted),
    "a fifth left out": Method(partial(left_out, share=0.2, mining=False)),
    "mining, a fifth left out": Method(partial(left_out, share=0.2, mining=True)),
    "both, a fifth left out": Method(partial(left_out, share=0.2, mining=True, fairness=True)),
    "true labels": Method(partial(truth, fairness=False)),
    "true labels, distance": Method(partial(truth, fairness=True)),
}
