"""Zero-shot fairness metrics on the validation set after each of the host's evaluations."""

from __future__ import annotations

from typing import Any

from .events import Callback, TrainState
from .flags import FairOptions


class FairEvaluationCallback(Callback):
    """placeholder"""

    def __init__(self, options: FairOptions) -> None:
        self.options = options
