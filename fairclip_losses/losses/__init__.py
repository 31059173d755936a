"""The losses: the fairness term, and `FairLoss` around the loss that you have."""

from .fair_loss import FairLoss, FairLossState, MiningUnit, Score
from .sinkhorn_fairness import SinkhornFairnessLoss

__all__ = ["FairLoss", "FairLossState", "MiningUnit", "Score", "SinkhornFairnessLoss"]
