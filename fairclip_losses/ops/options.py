"""What the solvers are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "dense", "streamed", "triton", "prefix"]


@dataclass(frozen=True)
class SinkhornOptions:
    """What `sinkhorn_divergence` was asked for; see its docstring."""

    p: int
    blur: float
    debias: bool
    scaling: float
    iterations: int | None
    tol: float
    max_iterations: int
    backend: Backend = "auto"

    @property
    def epsilon(self) -> float:
        """Strength of the entropy, in the unit of the cost."""
        return self.blur**self.p

    def is_watched(self, points: Tensor) -> bool:
        """Whether reading a number back is free, so that convergence can be tested."""
        on_host = points.device.type == "cpu" and not torch.compiler.is_compiling()
        return on_host and self.iterations is None
