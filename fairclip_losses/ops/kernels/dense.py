"""The Gibbs kernel with all costs in memory: the geometry that needs nothing of the points."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import is_readable
from .costs import costs, rounding

LOG2_E = math.log2(math.e)
_MOST_COSTS = 512**2
# Longest way of a potential from the one at which a kernel was formed, in units of epsilon: the
# terms that matter there have not vanished, in float32 either.
_NEAR = 20.0


class _Gibbs(NamedTuple):
    """A Gibbs kernel as it was formed at one potential, for others near that one."""

    epsilon: Tensor | float
    log_b: Tensor
    g: Tensor
    f: Tensor  # softmin g
    share: Tensor  # (*, N, M), P(j | i)


def following(epsilon: Tensor | float, log_b: Tensor, g: Tensor, reached: Tensor) -> Tensor:
    """Return the potential that meets b, where the plan under g gives y the masses ``reached``.

    A mass that underflows raises the potential by some hundred epsilon: as far as one round may.
    Where b is 0, g stays.
    """
    log_reached = reached.clamp(min=torch.finfo(reached.dtype).tiny).log()
    return torch.where(log_b > -torch.inf, g - epsilon * (log_reached - log_b), g)


class DenseKernel:
    """The Gibbs kernel between x (*, N, D) and y (*, M, D), all N x M costs in memory."""

    spare = 1e-2  # part of ``tol`` that rounds go on to, as they cost next to nothing

    @staticmethod
    def fits(n: int, m: int) -> bool:
        """Whether so many costs may stay in memory."""
        return n * m <= _MOST_COSTS

    def __init__(self, x: Tensor, y: Tensor, p: int, *, rough: bool = False) -> None:
        self.x, self.y, self.p = x, y, p
        self._gibbs: _Gibbs | None = None
        self.cost = costs(x, y, p, rough=rough)

    @cached_property
    def rounding(self) -> float:
        """A bound on the error of the costs, in their unit; the host's only."""
        return rounding(self.x, self.y, self.p, self.cost.dtype)

    @property
    def unit(self) -> float:
        """The relative rounding of a number in the kernel."""
        return torch.finfo(self.cost.dtype).eps

    @property
    def transposed(self) -> DenseKernel:
        """The kernel from y to x, sharing the costs."""
        other = object.__new__(DenseKernel)
        other.x, other.y, other.p, other._gibbs = self.y, self.x, self.p, None
        other.cost = self.cost.transpose(-1, -2)
        return other

    def _weights(
        self, epsilon: Tensor | float, log_b: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``softmin``, ``b_j exp((g_j - C_ij) / eps)`` by a factor, its sum (*, N, 1)."""
        scale, dtype = -LOG2_E / epsilon, self.cost.dtype
        height = LOG2_E * log_b - scale * g  # powers of two are the faster ones
        if isinstance(scale, Tensor):
            exponent = height.to(dtype)[..., None, :] + self.cost * scale.to(dtype)[..., None]
        else:
            exponent = torch.add(height.to(dtype)[..., None, :], self.cost, alpha=scale)
        largest = exponent.amax(-1, keepdim=True)
        weight = exponent.sub_(largest).exp2_()
        total = weight.sum(-1, keepdim=True)
        return (largest + total.log2())[..., 0].to(height.dtype) / scale, weight, total

    def softmin(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """``-eps log sum_j b_j exp((g_j - C_ij) / eps)``, shape (*, N); eps a number or (*, 1)."""
        return self._weights(epsilon, log_b, g)[0]

    def conditional(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """``P(j | i)``, shape (*, N, M): where the mass of x_i goes under the potential g."""
        known = self._near(epsilon, log_b, g)
        if known is None:
            return self.softmin_and_conditional(epsilon, log_b, g)[1]
        plan = known[0].share * known[1][..., None, :]
        return plan.div_(plan.sum(-1, keepdim=True))

    def softmin_and_conditional(
        self, epsilon: Tensor | float, log_b: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both of the above for little more than the time of one."""
        softmin, weight, total = self._weights(epsilon, log_b, g)
        return softmin, weight.div_(total)

    def sweep(
        self, epsilon: Tensor | float, log_a: Tensor, log_b: Tensor, g: Tensor,
        near: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One round: ``f = softmin g``, (*, N), and the g that follows it where b > 0, (*, M).

        ``near`` is a guess at f, of use to some kernels.
        """
        gibbs, change = self._formed(epsilon, log_b, g)
        total = _product(gibbs.share, change)
        reached = change * _product(gibbs.share.transpose(-1, -2), log_a.exp() / total)
        return gibbs.f - epsilon * total.log(), following(epsilon, log_b, g, reached)

    def softmin_within(self, epsilon: float, log_a: Tensor) -> Callable[[Tensor], Tensor]:
        """Return ``softmin`` of x's potential towards x itself, by a kernel formed once for all.

        The plan gives x_i at least ``a_i^2 exp(2 f_i / eps)`` to itself, so no potential is above
        ``-eps log(a_i) / 2``, and no term that matters vanishes. Right where a has mass.
        """
        gibbs = self.cost.mul(-LOG2_E / epsilon).exp2_()
        least = torch.finfo(gibbs.dtype).tiny

        def softmin(f: Tensor) -> Tensor:
            total = _product(gibbs, torch.add(log_a, f, alpha=1.0 / epsilon).exp_())
            return total.clamp_(min=least).log_().mul_(-epsilon)

        return softmin

    def _formed(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> tuple[_Gibbs, Tensor]:
        """Return the kernel as it was formed near g, and by what its columns have changed, (*, M).

        Then rounds need no exponential of N x M numbers. Where looking how near that is would wait
        for the device, each forms its own.
        """
        known = self._near(epsilon, log_b, g)
        if known is not None:
            return known
        self._gibbs = None  # and its memory
        new = _Gibbs(epsilon, log_b, g, *self.softmin_and_conditional(epsilon, log_b, g))
        if is_readable(self.x):
            self._gibbs = new
        return new, torch.ones_like(g)

    def _near(
        self, epsilon: Tensor | float, log_b: Tensor, g: Tensor
    ) -> tuple[_Gibbs, Tensor] | None:
        old = self._gibbs
        if old is None or old.log_b is not log_b:
            return None
        if old.epsilon is not epsilon:
            if isinstance(epsilon, Tensor) or isinstance(old.epsilon, Tensor):
                return None  # one for each pair of clouds: the same only as the same tensor
            if old.epsilon != epsilon:
                return None
        change = (g - old.g) / epsilon
        return (old, change.exp_()) if bool((change.abs() <= _NEAR).all()) else None

    def average(self, epsilon: float, log_b: Tensor, g: Tensor, values: Tensor) -> Tensor:
        """``sum_j P(j | i) values_j``, shape (*, N)."""
        return (self.conditional(epsilon, log_b, g) @ values[..., None])[..., 0]

    def pull(self, epsilon: float, log_b: Tensor, g: Tensor) -> Tensor:
        """``sum_j P(j | i) grad_x c(x_i, y_j)``, shape (*, N, D): the gradient per unit of mass."""
        plan = self.conditional(epsilon, log_b, g)
        if self.p == 1:  # unit vectors, and 0 where the points meet
            plan = torch.where(self.cost > 0, plan / self.cost, 0.0)
            return plan.sum(-1, keepdim=True) * self.x - plan @ self.y
        return self.x - plan @ self.y


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return ``matrix @ vector``, (*, N), in the vector's dtype."""
    if matrix.dim() == 2:  # one for all rows: one product of matrices
        return (vector.to(matrix.dtype) @ matrix.T).to(vector.dtype)
    return (matrix @ vector.to(matrix.dtype)[..., None])[..., 0].to(vector.dtype)
