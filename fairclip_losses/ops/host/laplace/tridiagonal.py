"""LAPACK's tridiagonal solvers for a system a row, each O(N).

Entries beside the diagonal are (N,) or (R, N): the k-th lies between unknowns k and k + 1, the last
is 0, so that all rows are one long system. What may be overwritten is.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg.lapack import dgtsv, dgttrs, dpttrs

from ..arrays import Array

# Fewest unknowns that SciPy's `dgttrs` takes.
_FEWEST = 3


def solve_symmetric_factors(diagonal: Array, below: Array, right: Array) -> Array:
    """Solve with the factors ``L D L^T`` that all rows share, L with ones on its diagonal."""
    solved: Array = dpttrs(diagonal, _between(below), right.T, overwrite_b=True)[0].T
    return solved


def solve_factors(below: Array, diagonal: Array, above: Array, right: Array) -> Array:
    """Solve with the factors ``L U``: ones and ``below``, ``diagonal`` and ``above``.

    They are (N,) and shared by all rows, or ``below`` and ``above`` are (R, N).
    """
    count = right.shape[-1]
    if count < _FEWEST:
        wide = [_padded(part, 0.0) for part in (below, above, right)]
        return solve_factors(wide[0], _padded(diagonal, 1.0), *wide[1:])[..., :count]
    columns = right.T
    if below.ndim > 1:
        diagonal = np.broadcast_to(diagonal, right.shape).reshape(-1)
        below, above, columns = below.reshape(-1), above.reshape(-1), right.reshape(-1, 1)
    size = len(columns)
    solved: Array = dgttrs(
        _between(below), diagonal, _between(above), np.zeros(size - 2),
        np.arange(1, size + 1, dtype=np.int32), columns, overwrite_b=True,
    )[0]  # fmt: skip
    return solved.T.reshape(right.shape)


def solve_tridiagonal(below: Array, diagonal: Array, above: Array, right: Array) -> Array:
    """Solve with matrices (R, N)."""
    solved: Array = dgtsv(
        _between(below.reshape(-1)), diagonal.reshape(-1), _between(above.reshape(-1)),
        right.reshape(-1, 1), overwrite_dl=True, overwrite_d=True, overwrite_du=True,
        overwrite_b=True,
    )[3]  # fmt: skip
    return solved.reshape(right.shape)


def _padded(part: Array, value: float) -> Array:
    """Append unknowns to each row."""
    sides = [(0, 0)] * (part.ndim - 1) + [(0, _FEWEST)]
    return np.pad(part, sides, constant_values=value)


def _between(beside: Array) -> Array:
    """Leave out the last entry, which lies between nothing; LAPACK's wrappers want one at least."""
    return beside[: max(beside.size - 1, 1)]
