"""Every method of the package as a pure, typed function: formula, shapes, source.

The modules keep the state and call these; a training loop with a state of its own can call them
directly.
"""

from ..data.groups import UNKNOWN
from ..ops import sinkhorn_divergence
from .fairness import (
    Detach,
    FairnessTerms,
    GroupReduction,
    group_membership,
    official_scores,
    sinkhorn_fairness,
    stack_groups,
)
from .mining import (
    CLEAN,
    FAULTY,
    KIND_NAMES,
    NOISY,
    History,
    Weighting,
    bad_pair_kinds,
    bad_pair_weights,
    history_statistics,
    history_z_score,
    pair_history,
    visit_weight,
)
from .mixture import gaussian_mixture_posterior, mixture_pair_kinds
from .pairs import (
    Normalization,
    caption_pair_losses,
    clip_pair_losses,
    distill_pair_losses,
    normalized_weights,
    pair_logits,
    pair_similarities,
    siglip_pair_losses,
    weighted_mean,
)

__all__ = [
    "CLEAN",
    "FAULTY",
    "KIND_NAMES",
    "NOISY",
    "UNKNOWN",
    "Detach",
    "FairnessTerms",
    "GroupReduction",
    "History",
    "Normalization",
    "Weighting",
    "bad_pair_kinds",
    "bad_pair_weights",
    "caption_pair_losses",
    "clip_pair_losses",
    "distill_pair_losses",
    "gaussian_mixture_posterior",
    "group_membership",
    "history_statistics",
    "history_z_score",
    "mixture_pair_kinds",
    "normalized_weights",
    "official_scores",
    "pair_history",
    "pair_logits",
    "pair_similarities",
    "siglip_pair_losses",
    "sinkhorn_divergence",
    "sinkhorn_fairness",
    "stack_groups",
    "visit_weight",
    "weighted_mean",
]
