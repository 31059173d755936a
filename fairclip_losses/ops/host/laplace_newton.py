"""Newton's method for p = 1 on a line in O(N) a round: banded equations.

With f the unknown, g = softmin f meets b, and the plan P misses a by ``r = a - P 1``. Newton's step
solves ``(diag(P 1) - P diag(1 / b) P^T) d = r`` (d in units of epsilon). Both products with P are
products with the kernel K, so with ``q = P^T d / b`` and ``h = P q / a`` as unknowns of their own
and K's tridiagonal inverse T,

    T (e^(-g/eps) q) = e^(f/eps) a d,   T (e^(-f/eps) h) = e^(g/eps) b q,   d = (1 - rho + h) / rho

where ``rho = P 1 / a``: a system of two bands a side in (q_1, h_1, q_2, h_2, ...). Its rows are
scaled so that no entry depends on more than the potentials' differences between neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg.lapack import dgbsv

from .arrays import Array
from .laplace import LOG_ZERO, Inverse, LaplaceKernel

# Longest change of a potential in the first round, in units of epsilon: far from the optimum the
# quadratic model of an exponential holds no further.
_TRUST = 5.0
# Largest log of an entry beside the diagonal: one larger is of a potential that no round leaves.
_CAP = 30.0
# Bands on either side of the diagonal, and rows of LAPACK's band storage for them.
_BANDS, _STORED = 2, 7
# Unknowns whose equations are in memory at once: 7 MB.
_AT_ONCE = 2**17
# Part of ``tol`` that Newton's last round reaches, unless rounding ends that before.
_FAR_BELOW = 1e-3
# Part of ``tol`` that the rounds for a measure against itself reach.
_BELOW = 1e-2
# Step and memory of the heavy ball for a linear map with eigenvalues in [1, 2].
_BALL_STEP, _BALL_MEMORY = 0.686, 0.0294


class Look(NamedTuple):
    """What is known at one potential f."""

    f: Array  # (R, K)
    g: Array  # (R, K) softmin of f
    due: Array  # (R, K) softmin of g
    error: Array  # (R,) L1 error of a's marginal
    value: Array  # (R,) of the dual

    def pick(self, better: Array, other: Look) -> Look:
        """Return the rows of ``other`` where it is better, the rest of this."""
        wide = better[:, None]
        parts = zip(self, other, strict=True)
        return Look(*(np.where(wide if old.ndim > 1 else better, new, old) for old, new in parts))


def log_weights(weights: Array) -> Array:
    """Return logs of weights, of nothing a number next to none."""
    there = weights > 0
    logs: Array = np.where(there, np.log(np.where(there, weights, 1.0)), LOG_ZERO)
    return logs


def solve_pair_on_line(
    kernel: LaplaceKernel, a: Array, b: Array, f: Array, tol: float, rounds: int, fixed: bool
) -> tuple[Look, int]:
    """Return the optimal potentials between a and b (R, K), from a near f, and the rounds taken.

    ``fixed`` rounds are all taken. Else the last ones go far below ``tol``, as Newton's do: where
    clusters lie many blurs apart, the dual value is flat and a small error of the marginal a large
    one of the potentials. Each row has a trust region: a step that lowers its dual value is taken
    back and shortened.
    """
    epsilon = kernel.epsilon
    log_a, log_b = log_weights(a), log_weights(b)

    def look(f: Array) -> Look:
        g = kernel.log_product(log_a + f / epsilon)
        g *= -epsilon
        due = kernel.log_product(log_b + g / epsilon)
        due *= -epsilon
        miss = a * np.abs(np.expm1(np.minimum((f - due) / epsilon, 700.0)))
        value = (a * f).sum(-1) + (b * g).sum(-1)
        return Look(f, g, due, miss.sum(-1), value)

    inverse = Inverse.of(kernel)
    best = look(look(f).due)
    radius = np.full((b.shape[0], 1), _TRUST)
    taken = 0
    worst = np.inf
    while taken < rounds:
        error, before = best.error.max(), worst
        if not fixed and (error <= _FAR_BELOW * tol or (error <= tol and error > 0.5 * before)):
            break
        worst = error
        step = _steps(inverse, a, b, best, epsilon)
        longest = np.abs(np.where(a > 0, step, 0.0)).max(-1, keepdims=True)
        step *= epsilon * radius / np.maximum(longest, radius)
        step += best.f
        new = look(step)
        better = new.value >= best.value - 1e-12 * np.abs(best.value)  # False for NaN
        radius = np.where(better[:, None], 4.0 * radius, np.minimum(radius, longest) / 4.0)
        best = best.pick(better, new) if not better.all() else new
        taken += 1
    return best, taken


def solve_self_on_line(
    kernel: LaplaceKernel, a: Array, tol: float, rounds: int, fixed: bool
) -> tuple[Array, Array]:
    """Return two neighbouring iterates of the potential of ``OT_eps(a, a)``, (R, K).

    The symmetric update has derivative -Q, with eigenvalues in [-1, 0]: the heavy ball below is the
    best for that range and contracts by 0.17 a round at any epsilon.
    """
    epsilon = kernel.epsilon
    log_a = log_weights(a)

    def softmin(f: Array) -> Array:
        return -epsilon * kernel.log_product(log_a + f / epsilon)

    f = 0.5 * softmin(np.zeros_like(a))
    following, before = softmin(f), f
    for k in range(rounds):
        # two rounds of plain averaging first: the range of eigenvalues is that of the optimum
        step, memory = (_BALL_STEP, _BALL_MEMORY) if k > 1 else (0.5, 0.0)
        f, before = f + step * (following - f) + memory * (f - before), f
        following = softmin(f)
        if not fixed:
            miss = a * np.abs(np.expm1(np.minimum((f - following) / epsilon, 700.0)))
            if (miss.sum(-1) <= _BELOW * tol).all():
                break
    return f, following


def _steps(inverse: Inverse, a: Array, b: Array, at: Look, epsilon: float) -> Array:
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
