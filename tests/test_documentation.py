"""The code in README.md and docs runs, and says nothing that is not so."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_clip import write_model

from fairclip_losses import FairLoss
from fairclip_losses.integrations.events import Callback, TrainState
from fairclip_losses.integrations.flags import build_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)


def test_the_readmes_loop_runs(tmp_path):
    (code,) = blocks(ROOT / "README.md")
    assert '"ViT-B-32"' in code  # a tiny model of open_clip's own stands in for it
    code = code.replace('"ViT-B-32"', repr(write_model(tmp_path)))
    torch.manual_seed(0)
    columns = (
        torch.randn(24, 3, 32, 32),
        torch.randint(1, 9, (24, 12)),
        torch.randint(0, 3, (24,)),
        torch.arange(24),
    )
    dataset = torch.utils.data.TensorDataset(*columns)
    names = {
        "dataset": dataset,
        "epochs": 2,
        "loader": torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True),
    }
    exec(code, names)
    assert isinstance(names["loss"], FairLoss)
    assert bool(torch.isfinite(names["total"]))
    assert (names["loss"].miner.report().visits == 2).all()


def test_the_pages_on_losses_and_callbacks_run():
    wrapped, own, *_ = blocks(ROOT / "docs" / "losses.md")
    names = {"torch": torch}
    exec(wrapped, names)
    exec(own, names)
    loss = FairLoss(names["MyLoss"](), names["BadPairMiner"](8))
    features = torch.randn(2, 8, 3)
    out = loss(features[0], features[1], pair_ids=torch.arange(8), output_dict=True)
    assert list(out) == ["contrastive_loss"]
    (seeded,) = blocks(ROOT / "docs" / "resume.md")
    freeze, best, _ = blocks(ROOT / "docs" / "callbacks.md")
    for callback in (seeded, freeze, best):
        exec(callback, names)
    assert all(issubclass(names[name], Callback) for name in ("Freeze", "SeedEpochs", "Best"))
    best = names["Best"]()
    for metrics in ({"clip_val_loss": 2.0}, {}, {"clip_val_loss": 3.0}):
        best.on_eval_end(TrainState(metrics=metrics))
    again = names["Best"]()
    again.load_state_dict(best.state_dict())
    assert again.best == 2.0


class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images, texts):
        images, texts = (F.normalize(part, dim=1) for part in (images, texts))
        scale = self.scale.exp()
        return {"image_features": images, "text_features": texts, "logit_scale": scale}


def test_the_recipes_for_lightning_and_accelerate_run(monkeypatch):
    """On stand-ins for the two, in one process."""
    of_lightning, of_accelerate = blocks(ROOT / "docs" / "losses.md")[2:]
    batch = (*torch.randn(2, 6, 3), torch.arange(6), torch.arange(6) % 3)

    class Accelerator(SimpleNamespace):
        process_index, num_processes = 0, 1

        def prepare(self, *parts):
            return parts

        def register_for_checkpointing(self, part):
            self.saved = part

        def backward(self, total):
            total.backward()

    modules = {"lightning": {"LightningModule": torch.nn.Module},
               "accelerate": {"Accelerator": Accelerator}}  # fmt: skip
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    model = Towers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"model": model, "optimizer": optimizer, "loader": [batch], "epochs": 2, "num_pairs": 6}
    exec(of_accelerate, names)
    assert model.scale != 1 and names["accelerator"].saved is names["loss"]
    assert (names["loss"].miner.report().visits == 2).all()
    exec(of_lightning, names)
    fair = names["FairClip"](model, 6)
    fair.global_rank, fair.trainer, logged = 0, SimpleNamespace(world_size=1), {}
    fair.log = lambda name, value, sync_dist: logged.update({name: float(value.detach())})
    fair.setup("fit")
    fair.training_step(batch, 0).backward()
    fair.eval().validation_step(batch[:2], 0)
    fair.on_train_epoch_end()
    loss = fair.loss
    fair.setup("test")
    assert fair.loss is loss and len(loss.miner.report()) == 6 and logged["val_loss"] > 0


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_every_flag_is_documented_and_every_documented_flag_is_there():
    text = "".join(path.read_text() for path in PAGES)
    documented = set(re.findall(r"--fair-[a-z-]*[a-z]", text))
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    assert documented == flags


def test_nothing_is_left_to_fill_in():
    for path in [*PAGES, ROOT / "CHANGELOG.md"]:
        assert "@@" not in path.read_text(), path
