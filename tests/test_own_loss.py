"""The example of a loss of one's own: its formula, its part in FairLoss, one process or two."""

from __future__ import annotations

import importlib.util
import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from open_clip import ClipLoss
from torch import nn

from fairclip_losses import BadPairMiner, FairLoss
from fairclip_losses.integrations.events import TrainState
from fairclip_losses.pair_terms import PairTerms

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_loss.py"
EPOCHS = 5


def load_example():
    spec = importlib.util.spec_from_file_location("own_loss", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_loss"] = module
    spec.loader.exec_module(module)
    return module


own_loss = load_example()


def features(count=6, size=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    image, text = F.normalize(torch.randn(2, count, size, generator=draw), dim=-1)
    return {
        "image_features": image.requires_grad_(),
        "text_features": text.requires_grad_(),
        "logit_scale": torch.tensor(9.0),
    }


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
    loss = FairLoss(base, BadPairMiner(6))
    assert torch.equal(loss(**out, pair_ids=ids), base(**out))
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
    assert FairLoss(state.loss).processes.world_size == 2


class Silent(nn.Module):
    """A loss with terms that does not say which process it is in."""

    def forward(self, image_features, text_features, logit_scale):
        return (image_features - text_features).square().sum(1).mean()

    def pair_terms(self, image_features, text_features, logit_scale):
        terms = (image_features - text_features).square().sum(1)
        return PairTerms(terms, {"contrastive_loss": terms})


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with pytest.raises(ValueError, match="2 processes train, and Silent does not say which"):
        FairLoss(Silent(), BadPairMiner(6))(**features(), pair_ids=torch.arange(6))
    alone = Silent()
    alone.world_size = 1
    FairLoss(alone, BadPairMiner(6))(**features(), pair_ids=torch.arange(6))
    model, loss, _ = load_example().train(EPOCHS, rank, 2)
    torch.save((model.module.state_dict(), loss.state_dict()), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.filterwarnings("default")
def test_two_processes_train_as_one():
    model, loss, mismatched = own_loss.train(EPOCHS)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder,), nprocs=2)
        ranks = [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]
    for weights, memory in ranks:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-5)
        for name, value in loss.state_dict().items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(memory[name], value, atol=1e-4, rtol=1e-4)
    kinds = loss.miner.report().kind
    assert (kinds == "faulty").any()  # mining took part
    assert (kinds[mismatched.numpy()] == "faulty").sum() > 0.5 * (kinds == "faulty").sum()
