"""Group fairness metrics on NumPy arrays, and the report of all of them with bootstrap intervals.

The public face of `fairclip_losses.evaluation.group_metrics`, where the conventions stand that all
metrics share, and of `fairclip_losses.evaluation.report`.
"""

from .evaluation.group_metrics import (
    between_group_disparity,
    demographic_parity_difference,
    equalized_odds_difference,
    equity_scaled,
    group_roc_auc,
    roc_auc,
)
from .evaluation.report import FairnessReport, fairness_report

__all__ = [
    "FairnessReport",
    "between_group_disparity",
    "demographic_parity_difference",
    "equalized_odds_difference",
    "equity_scaled",
    "fairness_report",
    "group_roc_auc",
    "roc_auc",
]
