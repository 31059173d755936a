"""The Sinkhorn kernel: public entry, exact path on a line, entropic path, dense reference."""

from .sinkhorn import sinkhorn_divergence

__all__ = ["sinkhorn_divergence"]
