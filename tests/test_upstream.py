"""The run of open_clip's own tests says when it ran nothing, and fails when it shows nothing."""

from __future__ import annotations

import pytest
import upstream_tests

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


def test_a_session_that_never_called_what_the_patch_replaces_fails(tmp_path, capfd):
    passing = tmp_path / "test_nothing.py"
    passing.write_text("def test_nothing():\n    pass\n")
    assert upstream_tests.run(tmp_path, (passing.name,), [], []) == 1
    said = capfd.readouterr().out
    assert "1 passed" in said
    assert "train_one_epoch" in said.split("never called: ")[1]
