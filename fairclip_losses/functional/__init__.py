"""Every method of the package as a pure, typed function: formula, shapes, source.

The modules keep the state and call these; a training loop with a state of its own can call them
directly.
"""

from ..data import UNKNOWN
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
from .mixture import bimodality, faulty_posterior, gaussian_mixture_posterior
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

__all__ = ["UNKNOWN", "sinkhorn_divergence"]
__all__ += ["Detach", "FairnessTerms", "GroupReduction", "group_membership", "official_scores"]
__all__ += ["sinkhorn_fairness", "stack_groups"]
__all__ += ["CLEAN", "FAULTY", "KIND_NAMES", "NOISY", "History", "Weighting"]
__all__ += ["bad_pair_kinds", "bad_pair_weights", "history_statistics", "history_z_score"]
__all__ += ["pair_history", "visit_weight"]
__all__ += ["bimodality", "faulty_posterior", "gaussian_mixture_posterior"]
__all__ += ["Normalization", "caption_pair_losses", "clip_pair_losses", "distill_pair_losses"]
__all__ += ["normalized_weights", "pair_logits", "pair_similarities", "siglip_pair_losses"]
__all__ += ["weighted_mean"]
