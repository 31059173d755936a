"""The run of open_clip's own tests says when it ran nothing, and fails when it shows nothing."""

from __future__ import annotations

import pytest
import upstream_plugin
import upstream_tests
from tiny_clip import write_pairs

from fairclip_losses.integrations.open_clip import HOOKS

pytest.importorskip("open_clip_train.main")


def test_without_the_source_distribution_it_says_that_nothing_was_run(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert upstream_tests.main(tmp_path / "downloads") == 0
    said = capsys.readouterr().out
    assert said.startswith("upstream tests: SKIPPED, nothing was run: pip cannot download")
    assert said.count("\n") == 1


def test_what_a_session_never_called_is_not_shown(monkeypatch):
    monkeypatch.setattr(upstream_plugin, "calls", dict.fromkeys(HOOKS, 1))
    assert upstream_plugin.unproven() == []
    upstream_plugin.calls["train_one_epoch"] = 0
    assert upstream_plugin.unproven() == ["train_one_epoch"]
    monkeypatch.setattr(upstream_plugin, "FAIR_FLAGS", ["--fair-loss"])
    assert upstream_plugin.unproven() == ["train_one_epoch", "the fair loss"]


TRAINS = """
from pathlib import Path
import pytest
from open_clip_train.main import main
from tiny_clip import HAS_LOCAL_DIR, write_model

@pytest.mark.parametrize("name", ["first", "second"])
def test_training(tmp_path, name):
    device = ["--device", "cpu"] if HAS_LOCAL_DIR else []
    model = write_model(Path(tmp_path) / "tiny")
    main(["--model", model, "--batch-size", "4", "--epochs", "1", "--workers", "0", "--name", name,
          *device])
"""


def test_a_session_with_the_flags_on_trains_every_run_with_them(tmp_path, capfd):
    (tmp_path / "test_trains.py").write_text(TRAINS)
    table = str(write_pairs(tmp_path, 8, "pairs"))
    data = ("--dataset-type", "csv", "--train-data", table, "--val-data", table)
    fair = [*data, "--fair-loss", "--fair-attributes", "sex"]
    assert upstream_tests.run(tmp_path, ("test_trains.py",), ["--precision", "fp32"], fair) == 0
    said = capfd.readouterr().out
    assert "2 passed" in said and "fair losses: 4 of 4, over 16 pairs" in said
