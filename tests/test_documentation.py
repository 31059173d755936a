"""The code in README.md and docs runs, and says nothing that is not so."""

from __future__ import annotations

import re
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

from fairclip_losses import FairLoss
from fairclip_losses.integrations.events import Callback
from fairclip_losses.integrations.flags import build_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)


class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)

    def forward(self, images, texts):
        return {
            "image_features": F.normalize(self.image(images), dim=-1),
            "text_features": F.normalize(self.text(texts), dim=-1),
            "logit_scale": torch.tensor(10.0),
        }


def test_the_readmes_loop_runs():
    (code,) = blocks(ROOT / "README.md")
    torch.manual_seed(0)
    columns = (
        torch.randn(24, 4), torch.randn(24, 4), torch.randint(0, 3, (24,)), torch.arange(24)
    )  # fmt: skip
    dataset = torch.utils.data.TensorDataset(*columns)
    names = {
        "open_clip": open_clip,
        "dataset": dataset,
        "epochs": 2,
        "loader": torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True),
        "model": Towers(),
    }
    exec(code, names)
    assert isinstance(names["loss"], FairLoss)
    assert bool(torch.isfinite(names["total"]))
    assert (names["loss"].miner.report().visits == 2).all()


def test_the_pages_on_losses_and_training_run():
    wrapped, own = blocks(ROOT / "docs" / "losses.md")
    names = {"torch": torch}
    exec(wrapped, names)
    exec(own, names)
    loss = FairLoss(names["MyLoss"](), names["BadPairMiner"](8))
    features = torch.randn(2, 8, 3)
    out = loss(features[0], features[1], pair_ids=torch.arange(8), output_dict=True)
    assert list(out) == ["contrastive_loss"]
    callback, _ = blocks(ROOT / "docs" / "training.md")
    exec(callback, names)
    assert issubclass(names["Freeze"], Callback)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_every_flag_is_documented_and_every_documented_flag_is_there():
    text = (ROOT / "docs" / "training.md").read_text()
    documented = set(re.findall(r"--fair-[a-z-]*[a-z]", text))
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    assert documented == flags


def test_nothing_is_left_to_fill_in():
    for path in [*PAGES, ROOT / "CHANGELOG.md"]:
        assert "@@" not in path.read_text(), path
