"""A step that the gradient scaler skips leaves no trace in the memory nor in the queue."""

from __future__ import annotations

import copy

import pytest
import torch
from no_read_back import NoReadBack
from open_clip.loss import ClipLoss
from torch import nn

from fairclip_losses import BadPairMiner, FairLoss, SinkhornFairnessLoss

PAIRS, BATCH, EPOCHS = 12, 4, 3
STEPS = PAIRS // BATCH


def build(num_pairs=PAIRS, mining_unit="pair", **options):
    return FairLoss(
        ClipLoss(),
        BadPairMiner(num_pairs, noisy_sigma=0.8, faulty_sigma=0.8, **options),
        SinkhornFairnessLoss(num_groups=2, queue_size=3),
        mining_unit=mining_unit,
    )


class Run:
    """A small model and loss under a scaler, in steps of ``accumulated`` passes each."""

    def __init__(self, loss, accumulated=1, scaler=None):
        torch.manual_seed(3)
        self.model = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 4)])
        self.loss, self.accumulated = loss, accumulated
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if scaler is None else scaler
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2)
        self.loss.follow(self.scaler)

    def step(self, number, poisoned=False):
        generator = torch.Generator().manual_seed(17)
        inputs = torch.randn(2, PAIRS, 5, generator=generator)
        ids = torch.arange(number % STEPS * BATCH, (number % STEPS + 1) * BATCH)
        self.optimizer.zero_grad()
        for turn in range(self.accumulated):
            image, text = (
                nn.functional.normalize(tower(side[ids]), dim=-1)
                for tower, side in zip(self.model, inputs, strict=True)
            )
            total = self.loss(
                image,
                text,
                torch.tensor(6.0),
                pair_ids=ids,
                groups=ids % 2,
                record=turn == self.accumulated - 1,
            )
            if poisoned and turn == 0:
                total = total * torch.tensor(torch.inf)
            self.scaler.scale(total / self.accumulated).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state(self):
        return self.loss.state_dict() | {
            f"model.{k}": v for k, v in self.model.state_dict().items()
        }


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(-7.0), other[name].nan_to_num(-7.0)), name
        else:
            assert value == other[name], name


KINDS = {
    "dense": {},
    "streaming": {"num_pairs": None},
    "weighted": {"record": "weighted", "history": "linear"},
    "batch unit": {"mining_unit": "batch", "num_pairs": None},
}


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_is_as_if_its_batch_never_came(kind, accumulated):
    """The first step, one in the middle of an epoch, and the last of an epoch overflow."""
    with_skips, without = (Run(build(**KINDS[kind]), accumulated) for _ in range(2))
    for number in range(EPOCHS * STEPS):
        for run in (with_skips, without):
            if number in (0, 4, 8):
                if run is with_skips:
                    run.step(number, poisoned=True)
            else:
                run.step(number)
            if number % STEPS == STEPS - 1:
                run.loss.end_epoch()
    assert with_skips.scaler.get_scale() == 2.0**9 and without.scaler.get_scale() == 2.0**12
    assert_same_state(with_skips.state(), without.state())
    assert with_skips.loss.miner.report().visits.sum() == (6 if kind == "batch unit" else 24)
    assert (with_skips.loss.miner.report().kind != "clean").any()


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_skip_following_a_scaler_changes_nothing(kind):
    """Also at the first step, when the scaler has no tensor yet, and where it is switched off."""
    runs = [
        Run(build(**KINDS[kind])),
        Run(build(**KINDS[kind]), scaler=torch.amp.GradScaler("cpu", enabled=False)),
    ]
    for number in range(EPOCHS * STEPS):
        for run in runs:
            run.step(number)
            if number % STEPS == STEPS - 1:
                run.loss.end_epoch()
    assert_same_state(runs[0].state(), runs[1].state())


def test_a_grown_scale_is_no_skip():
    run = Run(build(), scaler=torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1))
    for number in range(STEPS):
        run.step(number)
    assert run.scaler.get_scale() == 64.0
    run.loss.settle()
    assert run.loss.miner.visits.tolist() == [1] * PAIRS


@pytest.mark.parametrize("poisoned", [False, True])
def test_a_saved_state_holds_the_step_just_made(poisoned):
    """Saved and loaded in the middle of an epoch; what waited in the other loss is forgotten."""
    run = Run(build())
    run.step(0)
    run.step(1, poisoned=poisoned)
    state = copy.deepcopy(run.loss.state_dict())
    assert int(state["miner.visits"].sum()) == BATCH * (1 if poisoned else 2)
    other = Run(build())
    other.step(2)
    other.loss.load_state_dict(state)
    assert_same_state(other.loss.state_dict(), state)


def test_following_no_longer_settles_and_records_at_once():
    run = Run(build())
    run.step(0)
    assert not run.loss.miner.visits.any()
    run.loss.follow(None)
    assert int(run.loss.miner.visits.sum()) == BATCH
    run.step(1)
    assert int(run.loss.miner.visits.sum()) == 2 * BATCH


def test_holding_and_settling_read_nothing_back():
    run = Run(build())
    run.loss.miner.validate = run.loss.fairness.validate = False
    run.step(0)
    with NoReadBack():
        run.loss.settle()
        image = nn.functional.normalize(torch.randn(BATCH, 4), dim=-1)
        ids = torch.arange(BATCH)
        run.loss(image, image, torch.tensor(3.0), pair_ids=ids, groups=ids % 2)


def test_a_miner_that_cannot_wait_is_refused():
    class Plain(nn.Module):
        def forward(self, losses, ids, record=None):
            return torch.ones_like(losses)

    loss = FairLoss(ClipLoss(), Plain())
    loss.follow(None)
    with pytest.raises(ValueError, match=r"needs a method remember, .* got Plain"):
        loss.follow(torch.amp.GradScaler("cpu"))
