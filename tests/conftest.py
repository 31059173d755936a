"""Settings of the whole suite."""

from __future__ import annotations

import os

from hypothesis import settings

# Everywhere else each run draws new problems; in continuous integration a run must repeat.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
