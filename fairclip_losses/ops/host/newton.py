"""The two iterations of the entropic problems on the CPU: Newton's between measures, a heavy ball
for a measure against itself.

With f the unknown, g = softmin f meets b, and the plan P misses a by ``r = a - P 1``. Newton's step
solves ``(diag(P 1) - P diag(1 / b) P^T) d = r``, d in units of epsilon; how, the kernel knows.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np

from .arrays import LARGEST, Array

# The log of weight 0: finite, so that differences are numbers, and nothing beside any other.
LOG_ZERO = -1e12
# Levels nearer to each other are the same.
LEVEL = 1e-14

# Longest change of a potential in the first round, in units of epsilon: far from the optimum the
# quadratic model of an exponential holds no further. And the damping then (Levenberg, Marquardt),
# which falls with the square of that length: clusters coupled by next to nothing would be moved by
# any number, at a wrong balance of masses, and leave no part of a step for the others.
_TRUST, _DAMPING = 5.0, 1e-5
# Part of ``tol`` that Newton's last round reaches, unless rounding ends that before: then so many
# rounds in a row do not halve the error. Or part of it, in units of epsilon, that a further step
# would have, if it were shorter than the last one as the error is smaller.
_FAR_BELOW, _STALLED, _NEXT_STEP = 1e-3, 3, 0.1
# The heavy ball (Polyak 1964) for derivatives with eigenvalues in [1, 2].
STEP = 4.0 / (math.sqrt(2.0) + 1.0) ** 2
MEMORY = ((math.sqrt(2.0) - 1.0) / (math.sqrt(2.0) + 1.0)) ** 2
# Part of ``tol`` that the rounds for a measure against itself reach.
SELF_BELOW = 1e-2


class HostKernel(Protocol):
    """A Gibbs kernel ``exp(-C_ij / eps)`` between points x (1 or R, N) and y (1 or R, M)."""

    epsilon: float

    @property
    def transposed(self) -> HostKernel:
        """The kernel from y to x."""

    def log_product(self, exponent: Array) -> Array:
        """``log sum_j exp(exponent_j - C_ij / eps)``, (R, N) from (R, M)."""

    def steps(self, a: Array, b: Array, at: Look, damping: Array) -> Array:
        """Newton's steps (R, N) in units of epsilon, for weights (1 or R, N) and (1 or R, M).

        ``damping`` (R, 1) is added to the eigenvalues of each row's equations.
        """


class Look(NamedTuple):
    """What is known at one potential f."""

    f: Array  # (R, N)
    g: Array  # (R, M) softmin of f
    due: Array  # (R, N) softmin of g
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


def missed(weights: Array, potential: Array, due: Array, epsilon: float) -> Array:
    """Return the mass by which a plan's marginal is off at each point.

    ``due`` is the potential that would meet the weights instead: under ``potential`` the plan gives
    the points ``weights exp((potential - due) / eps)``.
    """
    mass: Array = (potential - due) / epsilon
    np.minimum(mass, LARGEST, out=mass)
    np.abs(np.expm1(mass, out=mass), out=mass)
    mass *= weights
    return mass


def solve_pair(
    kernel: HostKernel, a: Array, b: Array, f: Array, tol: float, rounds: int, fixed: bool
) -> tuple[Look, int]:
    """Return the optimal potentials between a and b, from a near f (R, N), and the rounds taken.

    ``fixed`` rounds are all taken. Else the last ones go far below ``tol``, as Newton's do: where
    clusters lie many blurs apart, the dual value is flat and a small error of the marginal a large
    one of the potentials. Each row has a trust region: a step that lowers its dual value is taken
    back and shortened.
    """
    epsilon = kernel.epsilon
    log_a, log_b = log_weights(a), log_weights(b)
    back = kernel.transposed

    def look(f: Array) -> Look:
        g = back.log_product(log_a + f / epsilon)
        g *= -epsilon
        due = kernel.log_product(log_b + g / epsilon)
        due *= -epsilon
        error = np.add.reduce(missed(a, f, due, epsilon), -1)
        value = np.add.reduce(a * f, -1) + np.add.reduce(b * g, -1)
        return Look(f, g, due, error, value)

    best = look(look(f).due)
    radius = np.full((f.shape[0], 1), _TRUST)
    there = a > 0
    taken = stalled = 0
    lowest = next_step = np.inf
    error = best.error.max()
    while taken < rounds:
        stalled = 0 if error <= 0.5 * lowest else stalled + 1
        lowest = min(error, lowest)
        done = stalled == _STALLED or next_step <= _NEXT_STEP * tol
        if not fixed and (error <= _FAR_BELOW * tol or (error <= tol and done)):
            break
        step = kernel.steps(a, b, best, _DAMPING * (_TRUST / radius) ** 2)
        size = np.abs(np.where(there, step, 0.0))
        longest = np.maximum.reduce(size, -1, keepdims=True)
        # entry by entry: points of next to no mass may have steps that dwarf all others
        np.clip(step, -radius, radius, out=step)
        step *= epsilon
        step += best.f
        new = look(step)
        better = new.value >= best.value - 1e-12 * np.abs(best.value)  # False for NaN
        radius = np.where(better[:, None], 4.0 * radius, np.minimum(radius, longest) / 4.0)
        best = best.pick(better, new) if not better.all() else new
        before, error = error, best.error.max()
        next_step = longest.max() * (error / before) if before > 0 else 0.0
        taken += 1
    return best, taken


def solve_self(
    kernel: HostKernel, a: Array, tol: float, rounds: int, fixed: bool
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
        step, memory = (STEP, MEMORY) if k > 1 else (0.5, 0.0)
        f, before = f + step * (following - f) + memory * (f - before), f
        following = softmin(f)
        if not fixed:
            miss = missed(a, f, following, epsilon)
            if (miss.sum(-1) <= SELF_BELOW * tol).all():
                break
    return f, following
