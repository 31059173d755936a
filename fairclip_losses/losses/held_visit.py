"""A visit that waits for the optimizer's step: a gradient scaler may skip it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class HeldVisit(NamedTuple):
    """What the miner and the queue are to remember of a batch once its step has been made."""

    visit: tuple[Tensor, Tensor] | None  # the miner's losses and ids
    scored: tuple[Tensor, Tensor | Mapping[str, Tensor]] | None  # the queue's scores and groups
    scaler: Any
    scale: Tensor  # the scaler's, before the step

    def kept(self) -> Tensor:
        """Whether the step was made, (): a scaler that skips one lowers its scale."""
        return current_scale(self.scaler) >= self.scale


def current_scale(scaler: Any) -> Tensor:
    """Return a copy of a gradient scaler's scale, without waiting for its device."""
    # get_scale() would wait; before the first use there is no tensor yet, and nothing to wait for.
    scale = getattr(scaler, "_scale", None)
    return torch.tensor(scaler.get_scale()) if scale is None else scale.detach().clone()
