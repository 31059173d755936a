"""How mining and the fairness term act on each other within FairLoss: mass, start, limit."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import Fixed, metadata, model_output, parts
from open_clip import ClipLoss
from scipy.stats import wasserstein_distance
from torch.nn.functional import normalize

from fairclip_losses import FairLoss, SinkhornFairnessLoss
from fairclip_losses.pair_terms import PairTerms


@settings(max_examples=40)
@given(count=st.integers(4, 20), seed=st.integers(0, 2**31), some_absent=st.booleans())
def test_the_miners_weights_are_the_mass_of_the_distributions(count, seed, some_absent):
    draw = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, generator=draw) + 0.5
    if some_absent:
        weights[2:4] = 0.0
    term = SinkhornFairnessLoss(p=1, num_groups=2, min_group_size=1)
    fair = FairLoss(ClipLoss(), Fixed(weights), term, 1.0, weighted_fairness=True)
    groups = torch.arange(count) % 2
    output = model_output("clip", count, seed=seed)
    terms = fair(**output, pair_ids=torch.arange(count), groups=groups, output_dict=True)
    losses = fair.last.pair_losses.double().numpy()
    mass = weights.double().numpy()
    of_groups = [own for code in range(2) if (own := mass * (groups == code).numpy()).sum() >= 1]
    distances = [wasserstein_distance(losses, losses, mass, own) for own in of_groups]
    expected = sum(distances) / max(len(distances), 1)
    found = float(terms["fairness_loss"].detach())
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


class Given(torch.nn.Module):
    """A loss whose per-pair terms are the input."""

    def pair_terms(self, values):
        return PairTerms(values, {"contrastive_loss": values})


@settings(max_examples=60)
@given(
    count=st.integers(4, 24),
    seed=st.integers(0, 2**31),
    limit=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    weight=st.sampled_from([0.01, 1.0, 1e4]),
    p=st.sampled_from([1, 2]),
    scale=st.sampled_from([1.0, 1024.0]),
)
def test_the_term_adds_no_more_than_the_limit_to_a_pairs_gradient(
    count, seed, limit, weight, p, scale
):
    draw = torch.Generator().manual_seed(seed)
    losses = 3 * torch.rand(count, generator=draw, dtype=torch.float64)
    weights = torch.rand(count, generator=draw, dtype=torch.float64)
    groups = (torch.rand(count, generator=draw) < 0.3).long()
    found = {}
    for name, most in (("free", float("inf")), ("limited", limit)):
        term = SinkhornFairnessLoss(p=p, num_groups=2)
        fair = FairLoss(Given(), Fixed(weights), term, weight, fairness_limit=most)
        leaf = losses.clone().requires_grad_()
        value = fair(values=leaf, pair_ids=torch.arange(count), groups=groups)
        found[name] = torch.autograd.grad(scale * value, leaf)[0] / scale
    base = weights / count
    expected = base + (found["free"] - base).clamp(-limit * base, limit * base)
    torch.testing.assert_close(found["limited"], expected, rtol=1e-6, atol=1e-12)


def test_the_limit_leaves_a_term_alone_that_is_differentiated_alone():
    losses = torch.tensor([0.1, 0.5, 2.0, 3.0], requires_grad=True)
    groups = torch.tensor([0, 0, 1, 1])
    term = SinkhornFairnessLoss(num_groups=2)
    fair = FairLoss(Given(), None, term, 7.0, fairness_limit=0.1)
    alone = fair(values=losses, groups=groups, output_dict=True)["fairness_loss"]
    (got,) = torch.autograd.grad(alone, losses)
    (expected,) = torch.autograd.grad(7.0 * term(losses, groups), losses)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("weight", [0.1, 10.0, 1000.0])
def test_a_large_weight_does_not_destroy_training(weight):
    """Two groups of unequal difficulty: the limited term must not raise the easy group's losses."""
    torch.manual_seed(0)
    images = normalize(torch.randn(64, 16), dim=1)
    groups = (torch.arange(64) % 4 == 0).long()
    noise = torch.where(groups == 1, 1.0, 0.1)[:, None] * torch.randn(64, 16)
    texts = torch.nn.Parameter(torch.randn(64, 16))
    term = SinkhornFairnessLoss(num_groups=2)
    fair = FairLoss(ClipLoss(), None, term, weight, fairness_limit=1.0)
    optimiser = torch.optim.Adam([texts], lr=0.05)
    for _ in range(150):
        output = {
            "image_features": normalize(images + 0.2 * noise, dim=1),
            "text_features": normalize(texts, dim=1),
            "logit_scale": torch.tensor(10.0),
        }
        optimiser.zero_grad()
        fair(**output, groups=groups).backward()
        optimiser.step()
    assert float(fair.last.pair_losses.mean()) < 1.0  # ln 64 = 4.2 at the start


def test_the_term_trains_from_its_start_on_and_is_measured_before():
    fair = parts(fairness_weight=0.5, fairness_start=2)
    free = parts(fairness_weight=0.5)
    for epoch in range(4):
        step = model_output(seed=epoch) | metadata(seed=epoch) | {"output_dict": True}
        found, expected = (loss(**step)["fairness_loss"] for loss in (fair, free))
        assert float(expected.detach()) > 0
        assert torch.equal(fair.last.fairness.total, free.last.fairness.total)
        assert torch.equal(found, expected if epoch >= 2 else torch.zeros_like(expected))
        if epoch == 2:
            resumed = parts(fairness_weight=0.5, fairness_start=2)
            resumed.load_state_dict(copy.deepcopy(fair.state_dict()))
            again = resumed(**step, record=False)
            assert float(again["fairness_loss"].detach()) > 0
        fair.end_epoch()
        free.end_epoch()
