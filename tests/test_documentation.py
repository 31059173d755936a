"""The code in README.md and docs runs, and says nothing that is not so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
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
    wrapped, own = blocks(ROOT / "docs" / "losses.md")
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
