"""The Sinkhorn kernel: public entries, exact path on a line, entropic paths, dense reference."""

from .options import ConvergenceWarning
from .result import SinkhornResult, sinkhorn_solve
from .sinkhorn import sinkhorn_divergence

__all__ = ["ConvergenceWarning", "SinkhornResult", "sinkhorn_divergence", "sinkhorn_solve"]
