"""The training command on a checkout of open_clip 4 (unreleased), where one can be had.

FAIRCLIP_OPEN_CLIP_4 names the checkout: git clone https://github.com/mlfoundations/open_clip and
pip install nothing, the tree is put before the installed release in a process of its own.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairclip_losses.integrations.events import Callback

TREE = os.environ.get("FAIRCLIP_OPEN_CLIP_4")
ROOT = Path(__file__).parents[1]
PAIRS, BATCH, EPOCHS = 24, 4, 2

FAIR = ("--fair-loss", "--fair-attributes", "sex", "site", "--fair-save-pairs")
IDLE = ("--fair-loss", "dbpm", "--fair-noisy-sigma", "inf", "--fair-faulty-sigma", "inf")
EVAL = ("--fair-eval-label", "bright", "--fair-eval-prompts", "dark", "bright")
COMPILE = ("--torchcompile", "--torchcompile-backend", "eager", "--torchcompile-strategy")
RUNS = {
    "plain": (),
    "idle": IDLE,
    "fair": (*FAIR, *EVAL),
    "accumulated": (*FAIR, "--accum-freq", "2"),
    "siglip": (*FAIR, "--siglip", "--precision", "amp_bf16"),
    "task": (*COMPILE, "task"),
    "idle task": (*IDLE, *COMPILE, "task"),
    "step": (*COMPILE, "step"),
    "idle step": (*IDLE, *COMPILE, "step"),
    "fair step": (*FAIR, *COMPILE, "step"),
    "distilled": FAIR,  # with flags of its own below
    "captioned": FAIR,
    "naflex": (*FAIR, "--use-naflex"),
}


class Initialises(Callback):
    """Fills a weight of CoCa's that open_clip leaves as it finds the memory, NaN maybe."""

    def on_epoch_start(self, state):
        if state.epoch == 0:
            torch.nn.init.normal_(state.model.text_decoder.text_projection, std=0.1)


def run_all(folder: Path) -> None:
    """Train every run in this process, which has the checkout first on its path."""
    import open_clip
    from tiny_clip import CONFIG, write_model, write_pairs

    from fairclip_losses import train

    torch.set_num_threads(1)
    assert Path(open_clip.__file__).is_relative_to(Path(str(TREE)).resolve()), open_clip.__file__
    table = write_pairs(folder, PAIRS, "train")
    model = write_model(folder / "tiny")
    weights = folder / "teacher.pt"
    torch.save(open_clip.create_model(model).state_dict(), weights)
    coca = json.loads(json.dumps(CONFIG))
    coca["model_cfg"] |= {"custom_text": True, "embed_dim": 32}
    coca["model_cfg"]["multimodal_cfg"] = {
        "context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1,
    }  # fmt: skip
    coca["model_cfg"]["vision_cfg"] |= {
        "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True,
    }  # fmt: skip
    coca["model_cfg"]["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    (folder / "coca").mkdir()
    (folder / "coca" / "open_clip_config.json").write_text(json.dumps(coca))
    more = {
        "distilled": ("--distill-model", model, "--distill-pretrained", str(weights)),
        "captioned": (
            *("--model", f"local-dir:{folder / 'coca'}"),
            *("--fair-callback", "test_open_clip_4:Initialises"),
        ),
    }

    def command(name, flags, epochs=EPOCHS):
        return [
            *("--train-data", str(table), "--val-data", str(table), "--dataset-type", "csv"),
            *("--model", model, "--device", "cpu", "--workers", "0", "--seed", "3"),
            *("--batch-size", str(BATCH), "--epochs", str(epochs), "--save-frequency", "1"),
            *("--warmup", "2", "--lr", "1e-3", "--logs", str(folder), "--name", name, *flags),
        ]

    status = {
        name: train.main(command(name, (*flags, *more.get(name, ()))))
        for name, flags in RUNS.items()
    }
    status["half"] = train.main(command("resumed", FAIR, epochs=1))
    # Every second visit is the resumed run's.
    status["resumed"] = train.main(command("resumed", (*FAIR, "--resume", "latest")))
    (folder / "status.json").write_text(json.dumps(status))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    if not TREE:
        pytest.skip("FAIRCLIP_OPEN_CLIP_4 names no checkout of open_clip 4")
    folder = tmp_path_factory.mktemp("runs")
    path = os.pathsep.join([str(Path(TREE) / "src"), str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=540, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "status.json").read_text()), done.stderr


def weights(folder, name):
    path = folder / name / "checkpoints" / f"epoch_{EPOCHS}.pt"
    return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]


def test_every_run_ends_well_and_what_cannot_be_is_refused_in_one_line(runs):
    _, status, stderr = runs
    assert status.pop("naflex") == 2
    assert "error: --fair-loss does not support --use-naflex\n" in stderr
    assert status == dict.fromkeys(status, 0)


@pytest.mark.parametrize(
    "plain,idle", [("plain", "idle"), ("task", "idle task"), ("step", "idle step")]
)
def test_a_fair_loss_that_does_nothing_trains_the_plain_weights(runs, plain, idle):
    folder, _, _ = runs
    expected, found = weights(folder, plain), weights(folder, idle)
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
    fair = weights(folder, "fair")
    assert any((expected[name] != fair[name]).any() for name in expected)


RECORDING = [name for name, flags in RUNS.items() if set(FAIR) <= set(flags) and name != "naflex"]


@pytest.mark.parametrize("name", [*RECORDING, "resumed"])
def test_each_pair_is_recorded_once_an_epoch(runs, name):
    folder, _, _ = runs
    with open(folder / name / "checkpoints" / f"pairs_epoch_{EPOCHS}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["id"]) for row in rows) == list(range(PAIRS))
    assert {int(row["visits"]) for row in rows} == {EPOCHS}


def test_fairness_is_evaluated_after_each_epoch(runs):
    folder, _, _ = runs
    lines = (folder / "fair" / "checkpoints" / "fair_results.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
