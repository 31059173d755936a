"""The example of a loss of one's own: its formula, its part in FairLoss."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from distributed_scenarios import own_example
from loss_cases import model_output
from open_clip import ClipLoss

from fairclip_losses import BadPairMiner, FairLoss
from fairclip_losses.distributed import Processes
from fairclip_losses.integrations.events import TrainState

own_loss = own_example()


def features():
    return model_output(count=6, dim=4, scale=9.0)


def test_without_margin_and_smoothing_it_is_open_clips_loss():
    out = features()
    ours = own_loss.MarginInfoNCE(margin=0.0, smoothing=0.0)(**out)
    torch.testing.assert_close(ours, ClipLoss()(**out))


def test_the_terms_are_those_of_a_double_loop():
    out = features()
    loss = own_loss.MarginInfoNCE(margin=0.2, smoothing=0.3)
    logits = (out["logit_scale"] * out["image_features"] @ out["text_features"].t()).tolist()
    count = len(logits)
    for i in range(count):
        logits[i][i] -= 9.0 * 0.2
    expected = []
    for i in range(count):
        term = 0.0
        for side in ([logits[i][j] for j in range(count)], [logits[j][i] for j in range(count)]):
            total = math.log(sum(math.exp(value) for value in side))
            for j, value in enumerate(side):
                target = (1 - 0.3) * (i == j) + 0.3 / count
                term += 0.5 * target * (total - value)
        expected.append(term)
    terms = loss.pair_terms(**out)
    assert terms.contrastive.tolist() == pytest.approx(expected, rel=1e-5)
    total = loss(**out, output_dict=True)["contrastive_loss"].detach()
    assert float(total) == pytest.approx(sum(expected) / count, rel=1e-5)


def test_a_flagged_pair_weighs_less_and_nothing_flagged_changes_nothing():
    out, ids = features(), torch.arange(6)
    base = own_loss.MarginInfoNCE()
    loss = FairLoss(base, BadPairMiner(6, faulty_sigma=3.0))
    torch.testing.assert_close(loss(**out, pair_ids=ids), base(**out))
    loss.end_epoch()
    loss.miner.memory.kind[2], loss.miner.memory.std[...] = 2, 0.5
    terms = base.pair_terms(**out).contrastive
    weights = torch.ones(6)
    weights[2] = torch.exp(-0.5 * ((terms[2].detach() - loss.miner.memory.mean) / 0.5) ** 2)
    assert weights[2] < 0.999
    total = loss(**out, pair_ids=ids, output_dict=True)["contrastive_loss"]
    torch.testing.assert_close(total, (weights * terms).mean())


def test_the_callback_puts_it_before_the_fair_loss():
    state = TrainState(args=SimpleNamespace(rank=1, world_size=2), loss=ClipLoss())
    own_loss.UseIt().on_loss_ready(state)
    assert isinstance(state.loss, own_loss.MarginInfoNCE)
    assert Processes.of(state.loss) == Processes(1, 2)
