"""Settings of the whole suite."""

from __future__ import annotations

import contextlib
import logging
import os
import sys

import pytest
import torch
from hypothesis import settings
from stub_open_clip import make_program
from stub_open_clip import registered as in_every_run

from fairclip_losses.integrations.open_clip import PROGRAM

# A busy machine may take its time over one example. In continuous integration a run must repeat;
# everywhere else each draws new problems.
settings.register_profile("patient", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("patient")


@pytest.fixture
def program(monkeypatch):
    """A stand-in for open_clip's training program."""
    module = make_program()
    monkeypatch.setitem(sys.modules, PROGRAM, module)
    return module


@pytest.fixture(autouse=True, scope="module")
def own_levels():
    """Take back the level that open_clip's setup_logging gives to every logger there is."""
    root = logging.getLogger()
    levels = {name: logging.getLogger(name).level for name in root.manager.loggerDict}
    level = root.level
    yield
    root.setLevel(level)
    for name in list(root.manager.loggerDict):
        logging.getLogger(name).setLevel(levels.get(name, logging.NOTSET))


@pytest.fixture(autouse=True)
def own_handlers():
    """Take back the handlers that open_clip's setup_logging leaves on the root logger."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    yield
    for handler in list(root.handlers):
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()


@pytest.fixture(autouse=True, scope="module")
def one_thread(request):
    """The kernel's small problems run slower on several threads, most of all on a busy machine."""
    before = torch.get_num_threads()
    if request.module.__name__.startswith("test_sinkhorn"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def registered():
    """Registers callbacks for every run of a test, and takes them back."""
    with contextlib.ExitStack() as stack:
        yield lambda callback: stack.enter_context(in_every_run(callback))
