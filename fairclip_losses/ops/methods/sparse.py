"""Newton's method on the entries that a plan has left at a small epsilon, for many points.

Where alternate updates need hundreds of rounds, a plan has a few entries a point that carry all but
a small part of ``tol``. Between passes over all costs, which find the entries and test the
marginals, the dual is maximised on those, epsilon by epsilon: a step is solved for by conjugate
gradients, whose products take no longer than there are entries.

Source: Tang et al. 2024, "Accelerating Sinkhorn algorithm with sparse Newton iterations".
"""

from __future__ import annotations

import math
from functools import cache
from inspect import signature
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import broadcast_shapes
from ..kernels.entries import large_entries
from ..kernels.streamed import StreamedKernel
from ..options import SinkhornOptions
from .progress import Progress, marginal_error
from .station import Station, settle

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

# Most entries kept, a point of either side, and what those left out may carry, in units of ``tol``.
_ENTRIES, _LEFT_OUT = 64, 0.05
# Part of an epsilon that the next one is, L1 error of the marginals at which it is settled, and
# most times that the entries at one epsilon are found anew.
_NEXT, _ON_THE_WAY, _TRIALS = 0.5, 1e-2, 8
# L1 error of the marginals that rounds go on to before, and most of those.
_SETTLED, _ROUNDS = 1e-3, 100
# Most steps on the same entries, and what they leave of the error that the entries do.
_STEPS, _EXACT = 30, 0.01
# Longest change of a potential in a step, in units of epsilon; the damping of a step's modes, first
# and least; what conjugate gradients leave of a right-hand side, and in how many products at most.
_LONGEST, _DAMPING, _LEAST_DAMPING, _RESIDUAL, _PRODUCTS = 30.0, 1e-4, 1e-12, 1e-4, 500


class Solved(NamedTuple):
    """Potentials that answer each other, the rounds taken and the L1 error of the marginals."""

    f: Tensor
    g: Tensor
    rounds: int
    error: float


def descend(
    kernel: StreamedKernel, log_a: Tensor, log_b: Tensor, options: SinkhornOptions, at: Station,
    epsilon: Tensor | float,
) -> Solved | None:  # fmt: skip
    """Solve from where rounds at ``epsilon``, a number or (*, 1), ended, down to the target.

    None where a plan on the way has too many entries, or ``tol`` was not reached.
    """
    x, y = kernel.x, kernel.y
    assert at.f is not None  # a round was taken
    lead = broadcast_shapes(x.shape[:-2], y.shape[:-2], log_a.shape[:-1], log_b.shape[:-1])
    epsilons = torch.as_tensor(epsilon, dtype=x.dtype).expand(*lead, 1)
    xs, ys = (cloud.expand(*lead, -1, -1).reshape(-1, *cloud.shape[-2:]) for cloud in (x, y))
    sides = log_a, log_b, at.f, at.g
    a, b, f, g = (side.expand(*lead, -1).reshape(-1, side.shape[-1]) for side in sides)
    solved: list[Solved] = []
    for row, near in enumerate(epsilons.flatten().tolist()):
        alone = StreamedKernel(xs[row], ys[row], kernel.p)
        found = _descend_row(alone, a[row], b[row], options, f[row], g[row], near)
        if found is None or not found.error <= options.tol:
            return None
        solved.append(found)
    f = torch.stack([row.f for row in solved]).view(*lead, -1)
    g = torch.stack([row.g for row in solved]).view(*lead, -1)
    if not bool((log_a > -torch.inf).all() and (log_b > -torch.inf).all()):
        f = kernel.softmin(options.epsilon, log_b, g)
        g = kernel.transposed.softmin(options.epsilon, log_a, f)
    return Solved(f, g, max(row.rounds for row in solved), max(row.error for row in solved))


def _descend_row(
    kernel: StreamedKernel, log_a: Tensor, log_b: Tensor, options: SinkhornOptions, f: Tensor,
    met: Tensor, epsilon: float,
) -> Solved | None:  # fmt: skip
    """`descend` between x (N, D) and y (M, D); absent points have potentials of 0."""
    here, there = log_a > -torch.inf, log_b > -torch.inf
    kernel, log_a = StreamedKernel(kernel.x[here], kernel.y[there], kernel.p), log_a[here]
    log_b = log_b[there]
    target, b, depth = options.epsilon, log_b.exp(), -math.log(_LEFT_OUT * options.tol)
    f, met = f[here], met[there]
    most = _ENTRIES * (len(log_a) + len(log_b))
    if large_entries(kernel, epsilon, f, met, depth, most) is None:
        return None
    near = Progress(_SETTLED)  # else links that must carry more are missing
    at = settle(kernel, Station(f, met, 0, None), log_a, log_b, epsilon, near, _ROUNDS)
    if at.f is None or at.error is None or not at.error <= _ON_THE_WAY:
        return None
    f, met, rounds, error, trials = at.f, at.g, at.rounds, at.error, 0
    while rounds < options.max_iterations and trials < _TRIALS:
        found = large_entries(kernel, epsilon, f, met, depth, most)
        if found is None or len(np.unique(found[1])) < len(met):  # sums of columns underflow
            return None
        if error <= _ON_THE_WAY:
            epsilon, trials = max(_NEXT * epsilon, target), trials if epsilon == target else 0
        plan = _Plan(*found, log_a.exp().numpy(), b.numpy())
        tol = _EXACT * (options.tol if epsilon == target else _ON_THE_WAY)
        lead, answer, steps = plan.solve(f.numpy(), epsilon, tol)
        met = torch.from_numpy(answer)
        f, following = kernel.sweep(epsilon, log_a, log_b, met, torch.from_numpy(lead))
        error, met = marginal_error(b, met, following, epsilon), following
        rounds, trials = rounds + steps + 2, trials + 1
        if epsilon == target and error <= options.tol:
            whole_f, whole_g = (torch.zeros_like(side, dtype=f.dtype) for side in (here, there))
            whole_f[here], whole_g[there] = f, met
            return Solved(whole_f, whole_g, rounds, error)
    return None


class _Plan:
    """The dual on some entries (i, j) of a plan, with their costs."""

    def __init__(self, i: Indices, j: Indices, cost: Array, a: Array, b: Array) -> None:
        self._i, self._j, self._cost, self._a, self._b = i, j, cost, a, b
        self._log_a, self._log_b = np.log(a)[i], np.log(b)[j]  # of the entries
        self._rows, self._columns = _Order(i, len(a)), _Order(j, len(b))

    def _answer(self, f: Array, epsilon: float) -> Array:
        """Return the g that meets b."""
        exponent = (f[self._i] - self._cost) / epsilon + self._log_a
        return -epsilon * self._columns.log_sum_exp(exponent)

    def _answer_back(self, g: Array, epsilon: float) -> Array:
        exponent = (g[self._j] - self._cost) / epsilon + self._log_b
        return -epsilon * self._rows.log_sum_exp(exponent)

    def solve(self, f: Array, epsilon: float, tol: float) -> tuple[Array, Array, int]:
        """Return the f that maximises ``<a, f> + <b, g>``, the g that answers it, and the steps.

        The equation, the damping and the plain round in place of a step that lowers the dual are
        those of `newton_pair`.
        """
        i, j, a, b = self._i, self._j, self._a, self._b
        root_a, root_b, log_a = np.sqrt(a), np.sqrt(b), np.log(a)
        damping, g = _DAMPING, self._answer(f, epsilon)
        for taken in range(_STEPS):
            share = np.exp((f[i] + g[j] - self._cost) / epsilon + self._log_a)
            reached = np.bincount(i, share * b[j], len(a)).clip(np.finfo(float).tiny)
            miss = a - reached
            if np.abs(miss).sum() <= tol:
                return f, g, taken
            half = share * root_b[j] / root_a[i]
            step = self._step(half, reached / a + damping, miss / root_a, root_a) / root_a
            candidate = f + epsilon * np.clip(step - a @ step, -_LONGEST, _LONGEST)
            met = self._answer(candidate, epsilon)
            candidate = self._answer_back(met, epsilon)
            plain = f - epsilon * (np.log(reached) - log_a)
            value, plain_value = a @ candidate + b @ met, a @ plain + b @ g
            better = value >= plain_value - 1e-14 * (abs(value) + abs(plain_value))
            f, damping = (candidate, damping / 10) if better else (plain, damping * 10)
            damping, g = min(max(damping, _LEAST_DAMPING), 1e3), self._answer(f, epsilon)
        return f, g, _STEPS

    def _step(self, half: Array, diagonal: Array, right: Array, null: Array) -> Array:
        """Solve ``(diag - H H^T + null null^T) step = right`` as nearly as is worth it."""
        # here, as importing it changes the filters of warnings
        from scipy.sparse import csr_array
        from scipy.sparse.linalg import LinearOperator, cg

        n, m = len(self._a), len(self._b)
        there = csr_array((half, (self._i, self._j)), shape=(n, m))
        back = there.T.tocsr()
        own = np.maximum(diagonal - np.bincount(self._i, half * half, n), 1e-3 * diagonal)

        def product(v: Array) -> Array:
            image: Array = diagonal * v - there @ (back @ v) + null * (null @ v)
            return image

        matrix = LinearOperator((n, n), matvec=product, dtype=float)
        inverse = LinearOperator((n, n), matvec=lambda v: v / own, dtype=float)
        step, _ = cg(matrix, right, maxiter=_PRODUCTS, M=inverse, **_precision())
        return np.asarray(step)


@cache
def _precision() -> dict[str, float]:
    """Return what tells `cg` how near is near enough; SciPy before 1.12 has another name for it."""
    from scipy.sparse.linalg import cg

    relative = "rtol" if "rtol" in signature(cg).parameters else "tol"
    return {relative: _RESIDUAL, "atol": 0.0}


class _Order:
    """The entries in the order of the points of one side, each of which has one at least."""

    def __init__(self, point: Indices, count: int) -> None:
        self._order = np.argsort(point, kind="stable")
        sizes = np.bincount(point, minlength=count)
        self._point, self._starts = point, np.cumsum(sizes) - sizes

    def log_sum_exp(self, values: Array) -> Array:
        """Return ``log sum exp`` of the values of each point's entries."""
        most = np.maximum.reduceat(values[self._order], self._starts)
        total = np.bincount(self._point, np.exp(values - most[self._point]), len(most))
        most += np.log(total)
        return most
