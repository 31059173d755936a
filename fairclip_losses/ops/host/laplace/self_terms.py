"""Newton's method for a measure against itself, p = 1 on a line."""

from __future__ import annotations

import numpy as np

from ..arrays import Array
from ..newton import SELF_BELOW, log_weights, missed
from .kernel import LaplaceKernel


def solve_self_by_newton(
    kernel: LaplaceKernel, a: Array, tol: float, rounds: int, fixed: bool
) -> tuple[Array, Array]:
    """Return two neighbouring iterates of the potential of ``OT_eps(a, a)``, (R, K).

    A round that does not lessen the error is replaced by the mean of the potential and its softmin,
    which never increases it.
    """
    epsilon = kernel.epsilon
    log_a = log_weights(a)

    def softmin(f: Array) -> Array:
        due = kernel.log_product(log_a + f / epsilon)
        due *= -epsilon
        return due

    def miss(f: Array, due: Array) -> Array:
        total: Array = np.add.reduce(missed(a, f, due, epsilon), -1)
        return total

    f = 0.5 * softmin(np.zeros_like(a))
    due = softmin(f)
    error = miss(f, due)
    for _ in range(rounds):
        if not fixed and error.max() <= SELF_BELOW * tol:
            break
        new = kernel.self_update(a, f, due)
        following = softmin(new)
        reached = miss(new, following)
        worse = ~(reached <= error) & (reached > SELF_BELOW * tol)
        if worse.any():
            new[worse] = 0.5 * (f + due)[worse]
            following = softmin(new)
            reached = miss(new, following)
        f, due, error = new, following, reached
    return f, due
