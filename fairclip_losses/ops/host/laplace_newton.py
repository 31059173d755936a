"""Newton's equations for p = 1 on a line are banded: O(N) a round.

Both products with the plan P are products with the kernel K, so with ``q = P^T d / b`` and
``h = P q / a`` as unknowns of their own and K's tridiagonal inverse T,

    T (e^(-g/eps) q) = e^(f/eps) a d,   T (e^(-f/eps) h) = e^(g/eps) b q,   d = (1 - rho + h) / rho

where ``rho = P 1 / a``: a system of two bands a side in (q_1, h_1, q_2, h_2, ...). Its rows are
scaled so that no entry depends on more than the potentials' differences between neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg.lapack import dgbsv

from .arrays import Array
from .newton import Look

# Shortest gap, in units of epsilon, in the inverse, which has no finite entry at 0.
_SHORTEST = 1e-7
# Largest log of an entry beside the diagonal: one larger is of a potential that no round leaves.
_CAP = 30.0
# Bands on either side of the diagonal, and rows of LAPACK's band storage for them.
_BANDS, _STORED = 2, 7
# Unknowns whose equations are in memory at once: 7 MB.
_AT_ONCE = 2**17


class Inverse(NamedTuple):
    """The kernel's inverse: its diagonal (K,) and, for the others, the factors that it shares.

    Entry (k, k + 1) is ``-exp(-gap_k) / (1 - exp(-2 gap_k))``, gap in units of epsilon.
    """

    diagonal: Array
    gap: Array  # (K - 1,)
    factor: Array  # (K - 1,) 1 / (1 - exp(-2 gap))

    @classmethod
    def of(cls, t: Array) -> Inverse:
        """Return the inverse for points t in units of epsilon; tiny gaps are widened."""
        gap = np.maximum(t[1:] - t[:-1], _SHORTEST)
        factor = -1.0 / np.expm1(-2.0 * gap)
        excess = factor - 1.0  # exp(-2 gap) / (1 - exp(-2 gap))
        diagonal = np.ones(t.size)
        diagonal[:-1] += excess
        diagonal[1:] += excess
        return cls(diagonal, gap, factor)


def newton_steps(inverse: Inverse, a: Array, b: Array, at: Look, epsilon: float) -> Array:
    """Return Newton's steps (R, K) in units of epsilon, some rows at a time."""
    rows, count = b.shape
    size = max(_AT_ONCE // count, 1)
    a = np.broadcast_to(a, b.shape)
    some = [slice(k, k + size) for k in range(0, rows, size)]
    parts = [_step(inverse, a[k], b[k], Look(*(p[k] for p in at)), epsilon) for k in some]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _step(inverse: Inverse, a: Array, b: Array, at: Look, epsilon: float) -> Array:
    rows, count = b.shape
    excess = (at.f - at.due) / epsilon
    rho = np.exp(np.minimum(excess, 700.0))
    # Constants are the null space; r sums to 0, so doubling one point's P 1 sets its step to 0.
    held = (np.arange(rows), a.argmax(-1))
    divisor = rho.copy()
    divisor[held] *= 2.0
    density = np.exp(np.minimum((at.f + at.g) / epsilon, 700.0))

    # LAPACK reads the bands of a column together: entry (i, j) is the (i - j + 4)th of column j.
    bands = np.zeros((rows, count, 2, _STORED))
    middle = 2 * _BANDS
    bands[..., middle] = inverse.diagonal[:, None]
    for unknown, potential in enumerate((at.g, at.f)):
        change = (potential[:, :-1] - potential[:, 1:]) / epsilon
        bands[:, 1:, unknown, middle - 2] = -inverse.factor * np.exp(
            np.minimum(change - inverse.gap, _CAP)
        )
        bands[:, :-1, unknown, middle + 2] = -inverse.factor * np.exp(
            np.minimum(-change - inverse.gap, _CAP)
        )
    source = a * density / divisor
    bands[:, :, 1, middle - 1] = -source
    bands[:, :, 0, middle + 1] = -b * density
    right = np.zeros((rows, count, 2))
    right[:, :, 0] = source * (1.0 - rho)
    solved = dgbsv(
        _BANDS, _BANDS, bands.reshape(-1, _STORED).T, right.reshape(-1, 1),
        overwrite_ab=True, overwrite_b=True,
    )  # fmt: skip
    h = solved[2].reshape(rows, count, 2)[:, :, 1]
    step = (1.0 - rho + h) / divisor
    step -= (a * step).sum(-1, keepdims=True)
    finite: Array = np.where(np.isfinite(step), step, 0.0)
    return finite
