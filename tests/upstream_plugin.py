"""A pytest plugin that runs open_clip's own tests with the patch in force.

``upstream_tests.py`` starts pytest with ``-p upstream_plugin``. The plugin patches the training
program before a test is collected, counts which functions of it are called by the patch in their
place, and fails the session where one never was. OPEN_CLIP_FLAGS in the environment are added to
every run of the training program. So are FAIR_FLAGS; the runs then must have trained with the fair
loss.
"""

from __future__ import annotations

import functools
import gc
import importlib
import os
import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest

from fairclip_losses.integrations import events
from fairclip_losses.integrations.events import Callback
from fairclip_losses.integrations.open_clip import HOOKS, PROGRAM, patch

OPEN_CLIP_FLAGS = shlex.split(os.environ.get("OPEN_CLIP_FLAGS", ""))
FAIR_FLAGS = shlex.split(os.environ.get("FAIR_FLAGS", ""))
NEEDS_NETWORK = {
    "test_training_mt5": "takes the configuration and tokenizer of mt5-base from Hugging Face"
}

calls: Counter[str] = Counter()  # by the patch, of the functions that it has replaced
losses: Counter[str] = Counter()  # what the fair loss has seen, over all runs


class Tally(Callback):
    """Counts the fair losses and the pairs that they were of."""

    def on_loss_end(self, state):
        losses["calls"] += 1
        losses["fair"] += "fairness_loss" in state.losses
        losses["pairs"] += len(state.loss.last.pair_losses)


def _counted(name, function):
    """open_clip's own function, as the patch finds it."""

    @functools.wraps(function)
    def call(*args, **options):
        caller = sys._getframe(1).f_globals["__name__"]
        calls[name] += caller.startswith("fairclip_losses.")
        if name == "main":
            args = ([*args[0], *OPEN_CLIP_FLAGS, *FAIR_FLAGS],)
        return function(*args, **options)

    return call


def pytest_configure():
    program = importlib.import_module(PROGRAM)
    for name in HOOKS:
        calls[name] = 0
        setattr(program, name, _counted(name, vars(program)[name]))
    patch()
    if FAIR_FLAGS:
        events.register(Tally())


def pytest_collection_modifyitems(items):
    for item in items:
        if reason := NEEDS_NETWORK.get(item.originalname):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Runs write gigabytes of checkpoints below the current folder: drop them test by test."""
    monkeypatch.chdir(tmp_path)
    trained = calls["train_one_epoch"]
    yield
    found = [path.suffix for path in Path("logs").glob("*/checkpoints/epoch_1.*")]
    for path in Path("logs").rglob("*.pt"):
        path.unlink()
    if FAIR_FLAGS and calls["train_one_epoch"] > trained:
        assert ".fair" in found and ".pt" in found
    gc.collect()  # a run's model and optimizer are gigabytes, and hold each other


def unproven():
    """What the session was to show and did not."""
    # open_clip evaluates only where there are validation data, which come with the fair flags.
    idle = [name for name, count in calls.items() if not count]
    idle = [name for name in idle if FAIR_FLAGS or name != "evaluate"]
    if FAIR_FLAGS and not 0 < losses["calls"] == losses["fair"] <= losses["pairs"]:
        idle.append("the fair loss")
    return idle


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.OK and unproven():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    write = terminalreporter.write_line
    write("patch in force, calls: " + ", ".join(f"{k} {n}" for k, n in sorted(calls.items())))
    if FAIR_FLAGS:
        write(f"fair losses: {losses['fair']} of {losses['calls']}, over {losses['pairs']} pairs")
    if missing := unproven():
        write("never called: " + ", ".join(missing), red=True)
