"""Robust and fair losses for CLIP training.

Bad pair mining and a Sinkhorn fairness term, as plug-ins for the loss and the training program that
you have. Method: Bansal et al., "Robust Fairness Vision-Language Learning for Medical Image
Analysis" (arXiv:2505.03153).
"""

from __future__ import annotations

from .losses import FairLoss, SinkhornFairnessLoss
from .miners import BadPairMiner
from .ops import sinkhorn_divergence
from .presets import PRESETS, build_fair_loss

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "BadPairMiner",
    "FairLoss",
    "SinkhornFairnessLoss",
    "__version__",
    "build_fair_loss",
    "sinkhorn_divergence",
]
