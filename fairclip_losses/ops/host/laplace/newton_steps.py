"""Newton's equations for p = 1 on a line are banded: O(N) a round.

With the plan P between a and b, the unknowns are means over it, ``q = P^T d / b`` of a's step d and
``h = P q / (P 1)`` of those. Both are products with the kernel K, whose inverse T is tridiagonal:

    e^(g/eps) T (e^(-g/eps) q) = a e^((f+g)/eps) d,   d = a / (P 1) - 1 + h,
    e^(due/eps) T (e^(-due/eps) h) = b e^((due+g)/eps) q,   due = softmin g.

Where q, d and h are 1 the left sides are the weights on the right: the rows of T so scaled sum to
these. That gives the diagonal, no entry depends on more than the differences of the potentials
between neighbours, and constants are the null space also on fewer points (`Nodes`). A damping takes
its part from the h in d.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg.lapack import dgbsv

from ..arrays import LARGEST, Array
from ..newton import Look
from .nodes import Nodes
from .tridiagonal import solve_tridiagonal

# Largest log of an entry beside the diagonal: one larger is of a potential that no round leaves.
_CAP = 30.0
# Least damping. Without any all rows sum to 0, and where the plan couples clusters by less than
# rounding, each cluster's do: steps that change nothing would be any number.
_LEAST_DAMPING = 1e-10
# Bands on either side of the diagonal, and rows of LAPACK's band storage for them.
_BANDS, _STORED = 2, 7


def newton_steps(
    nodes: Nodes, a: Array, b: Array, at: Look, damping: Array, epsilon: float
) -> Array:
    """Return Newton's steps (R, K) in units of epsilon."""
    f = at.f / epsilon
    both = np.empty((2, *at.g.shape))
    np.divide(at.g, epsilon, out=both[0])
    np.divide(at.due, epsilon, out=both[1])
    g, due = both
    step: Array = np.expm1(np.minimum(due - f, LARGEST))
    f += g
    weight_a, weight_b = _weighted(a, f), _weighted(b, due + g)
    right = np.zeros((len(step), nodes.size, 2))
    right[..., 0] = nodes.gather(weight_a * step)
    on_nodes = np.empty((2, len(step), nodes.size))
    on_nodes[0], on_nodes[1] = nodes.gather(weight_a), nodes.gather(weight_b)

    # LAPACK reads the bands of a column together: entry (i, j) is the (i - j + 4)th of column j.
    # The unknowns are (q_1, h_1, q_2, h_2, ...).
    bands = np.zeros((*right.shape, _STORED))
    of_either = bands.transpose(2, 0, 1, 3)
    middle = 2 * _BANDS
    after, before = _beside(nodes, both)
    of_either[..., middle] = on_nodes + after
    of_either[..., 1:, middle] += before[..., :-1]
    of_either[..., 1:, middle - 2] = -after[..., :-1]
    of_either[..., :-1, middle + 2] = -before[..., :-1]
    bands[..., 0, middle + 1] = -on_nodes[1]
    bands[..., 1, middle - 1] = (np.maximum(damping, _LEAST_DAMPING) - 1.0) * on_nodes[0]
    solved = dgbsv(
        _BANDS, _BANDS, bands.reshape(-1, _STORED).T, right.reshape(-1, 1),
        overwrite_ab=True, overwrite_b=True,
    )  # fmt: skip
    h: Array = solved[2].reshape(right.shape)[..., 1]
    step += nodes.spread(h)
    step -= np.add.reduce(a * step, -1, keepdims=True)
    step[~np.isfinite(step)] = 0.0
    return step


def _weighted(weights: Array, exponent: Array) -> Array:
    """Return ``weights exp(exponent)``, in the place of the exponent."""
    np.exp(np.minimum(exponent, LARGEST, out=exponent), out=exponent)
    exponent *= weights
    return exponent


def self_update(nodes: Nodes, a: Array, f: Array, due: Array, epsilon: float) -> Array:
    """Return Newton's next f (R, K) for a measure against itself, from f and its softmin.

    With Q the conditional plan, it is ``due + h`` with ``h = Q (f - due - h)``: tridiagonal.
    """
    change, scaled = (f - due) / epsilon, due / epsilon
    weight = _weighted(a, scaled + f / epsilon)
    right, on_a = nodes.gather(weight * change), nodes.gather(weight)
    after, before = _beside(nodes, scaled)
    diagonal = 2.0 * on_a + after
    diagonal[:, 1:] += before[:, :-1]
    h = nodes.spread(solve_tridiagonal(-before, diagonal, -after, right))
    h *= epsilon
    h += due
    return h


def _beside(nodes: Nodes, potential: Array) -> tuple[Array, Array]:
    """Return less the entries from each node to the next and back, (*, J), the last 0."""
    potential = nodes.at(potential)
    change = potential[..., :-1] - potential[..., 1:]
    after, before = np.zeros((2, *potential.shape))
    for way, beside in ((change, after), (-change, before)):
        way += nodes.coupling
        np.exp(np.minimum(way, _CAP, out=way), out=beside[..., :-1])
    return after, before
