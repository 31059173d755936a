"""What the CPU solvers on a line share: Newton's method on the dual, and the loop for self-terms.

For a potential f, ``g = softmin f`` meets b, and the first marginal of the coupling P differs from
a. Newton's step d solves ``(diag(P 1) - P diag(1 / b) P^T) d = a - P 1``; how, the kernel knows.
All potentials here are in units of epsilon. Arrays are (R, N) and (R, M): R rows at once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from .options import SinkhornOptions, warn_unconverged

Array = npt.NDArray[Any]

# The log of weight 0: finite, so that differences are numbers, and nothing beside any other.
LOG_ZERO = -1e12
# Largest exponent whose exponential is a number, with room for a product or two.
MAX_EXPONENT = 700.0
# Cumulative weights nearer to each other than this are equal: rounding of sums is less.
CUMULATIVE_WEIGHT_TOL = 1e-14

# Most iterations where the options leave more: Newton takes some 5 to 25, the heavy ball 12.
MAX_NEWTON_ITERATIONS, MAX_SELF_ITERATIONS = 40, 100
# Longest first step, in units of epsilon: the quadratic model of an exponential holds no further.
# And the Levenberg-Marquardt damping then, which falls with the square of that length: clusters
# coupled by next to nothing would be moved by any number, and leave no part of a step for others.
MAX_STEP_EPS, DAMPING = 5.0, 1e-5
# Newton's method goes on to this part of ``tol`` while each step halves the error at least: where
# clusters lie many blurs apart a small marginal error is a large one of the potentials.
NEWTON_TOL_FACTOR = 1e-3
# Self-terms go on to this part of ``tol``: between measures that hardly differ the divergence is a
# small difference of them.
SELF_TOL_FACTOR = 1e-3
# The heavy ball (Polyak 1964) for derivatives with eigenvalues in [1, 2], as ``f - softmin f`` has;
# the square root of the momentum is the rate of convergence.
HEAVY_BALL_STEP = 4.0 / (math.sqrt(2.0) + 1.0) ** 2
HEAVY_BALL_MOMENTUM = ((math.sqrt(2.0) - 1.0) / (math.sqrt(2.0) + 1.0)) ** 2


class LineKernel(Protocol):
    """A Gibbs kernel ``exp(-C_ij / eps)`` between points x (N,) and y (M,)."""

    @property
    def transposed(self) -> LineKernel:
        """The kernel from y to x."""

    def log_product(self, exponent: Array) -> Array:
        """``log sum_j exp(exponent_j - C_ij / eps)``, (R, N) from (R, M)."""

    def steps(self, a: Array, b: Array, at: DualState, damping: Array) -> Array:
        """Newton's steps (R, N); ``damping`` (R, 1) adds to eigenvalues."""


class DualState(NamedTuple):
    """What is known at one potential f."""

    f: Array  # (R, N)
    g: Array  # (R, M) softmin of f
    f_next: Array  # (R, N) softmin of g
    marginal_error: Array  # (R,) L1 error of a's marginal
    dual_value: Array  # (R,)


class Between(NamedTuple):
    """A solved problem between two measures, a row each."""

    cost: Array  # (R,)
    f: Array  # (R, N)
    g: Array  # (R, M)
    grad_x: Array  # (R, N) gradient of the cost in each point, per unit of its mass
    grad_y: Array  # (R, M)
    iterations: int


class Within(NamedTuple):
    """A solved problem of measures against themselves, a row each."""

    cost: Array  # (R,)
    f: Array  # (R, N)
    grad: Array  # (R, N) gradient of half the cost in each point, per unit of its mass


Solved = TypeVar("Solved", Between, Within)


def join_rows(parts: list[Solved]) -> Solved:
    """Put the rows of some solutions one after the other; the most iterations count."""
    joined: list[Any] = [
        max(column) if isinstance(column[0], int) else np.concatenate(column)
        for column in zip(*parts, strict=True)
    ]
    return type(parts[0])(*joined)


def log_weights(weights: Array) -> Array:
    """Return logs of weights, `LOG_ZERO` of 0."""
    logs: Array = np.log(weights, out=np.full(weights.shape, LOG_ZERO), where=weights > 0)
    return logs


def marginal_violation(weights: Array, f: Array, f_next: Array) -> Array:
    """Return by how much the marginal ``weights exp(f - f_next)`` is off; f_next meets it."""
    excess: Array = np.expm1(np.minimum(f - f_next, MAX_EXPONENT))
    return weights * np.abs(excess)


def newton_between(
    kernel: LineKernel, a: Array, b: Array, f: Array, options: SinkhornOptions
) -> tuple[DualState, int]:
    """Return the optimum between a and b, from a potential near f (R, N), and the iterations taken.

    Each row has a trust region: a step that lowers its dual value is taken back and shortened.
    """
    log_a, log_b, tol = log_weights(a), log_weights(b), options.tol

    def state_at(f: Array) -> DualState:
        g = -kernel.transposed.log_product(log_a + f)
        f_next = -kernel.log_product(log_b + g)
        error = marginal_violation(a, f, f_next).sum(-1)
        return DualState(f, g, f_next, error, (a * f).sum(-1) + (b * g).sum(-1))

    best = state_at(state_at(f).f_next)
    radius = np.full((f.shape[0], 1), MAX_STEP_EPS)
    iterations, lowest, error = 0, np.inf, best.marginal_error.max()
    for _ in range(options.iterations or min(MAX_NEWTON_ITERATIONS, options.max_iterations)):
        enough = error <= NEWTON_TOL_FACTOR * tol or (error <= tol and error > 0.5 * lowest)
        if enough and options.iterations is None:
            break
        lowest = min(error, lowest)
        step = kernel.steps(a, b, best, DAMPING * (MAX_STEP_EPS / radius) ** 2)
        longest = np.where(a > 0, np.abs(step), 0.0).max(-1, keepdims=True)
        # entry by entry: points of next to no mass may have steps that dwarf all others
        new = state_at(best.f + np.clip(step, -radius, radius))
        # False for NaN
        better = new.dual_value >= best.dual_value - 1e-12 * np.abs(best.dual_value)
        radius = np.where(better[:, None], 4.0 * radius, np.minimum(radius, longest) / 4.0)
        rows = zip(new, best, strict=True)
        best = DualState(*(np.where(better, one.T, other.T).T for one, other in rows))
        error = best.marginal_error.max()
        iterations += 1
    warn_unconverged(float(error), options, iterations)
    return best, iterations


def heavy_ball_within(
    kernel: LineKernel, a: Array, options: SinkhornOptions
) -> tuple[Array, Array]:
    """Return f (R, N) of ``OT_eps(a, a)`` and softmin f, which equals it to the tolerance.

    The contraction is 0.17 an iteration at any epsilon.
    """
    log_a, error = log_weights(a), np.inf
    f = before = -0.5 * kernel.log_product(log_a)
    f_next = -kernel.log_product(log_a + f)
    most = options.iterations or min(MAX_SELF_ITERATIONS, options.max_iterations)
    for k in range(most):
        # plain averages first: the bounds of the eigenvalues are those at the optimum
        step, momentum = (HEAVY_BALL_STEP, HEAVY_BALL_MOMENTUM) if k > 1 else (0.5, 0.0)
        f, before = f + step * (f_next - f) + momentum * (f - before), f
        f_next = -kernel.log_product(log_a + f)
        error = float(marginal_violation(a, f, f_next).sum(-1).max())
        if options.iterations is None and error <= SELF_TOL_FACTOR * options.tol:
            break
    warn_unconverged(error, options, most)
    return f, f_next
