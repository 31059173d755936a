"""The Gibbs kernel with all costs in memory: the geometry that needs nothing of the points."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_COSTS = 512**2


def following(epsilon: Tensor | float, log_b: Tensor, g: Tensor, reached: Tensor) -> Tensor:
    """Return the potential that meets b, where the plan under g gives y the masses ``reached``.

    A mass that underflows raises the potential by some hundred epsilon: as far as one round may.
    Where b is 0, g stays.
    """
    log_reached = reached.clamp(min=torch.finfo(reached.dtype).tiny).log()
    return torch.where(log_b > -torch.inf, g - epsilon * (log_reached - log_b), g)


class DenseKernel:
    """The Gibbs kernel between x (*, N, D) and y (*, M, D), all N x M costs in memory."""

    @staticmethod
    def fits(n: int, m: int) -> bool:
        """Whether so many costs may stay in memory."""
        return n * m <= _MOST_COSTS

    def __init__(self, x: Tensor, y: Tensor, p: int) -> None:
        self.x, self.y, self.p = x, y, p
        if x.shape[-1] == 1:
            distance = (x - y.transpose(-1, -2)).abs()
        else:
            distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        self.distance = distance
        self.cost = distance if p == 1 else 0.5 * distance.square()

    @property
    def transposed(self) -> DenseKernel:
        """The kernel from y to x, sharing the costs."""
        other = object.__new__(DenseKernel)
        other.x, other.y, other.p = self.y, self.x, self.p
        other.distance = self.distance.transpose(-1, -2)
        other.cost = self.cost.transpose(-1, -2)
        return other

    def _exponent(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        scale = epsilon[..., None] if isinstance(epsilon, Tensor) else epsilon
        return (log_b + g / epsilon)[..., None, :] - self.cost / scale

    def softmin(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """``-eps log sum_j b_j exp((g_j - C_ij) / eps)``, shape (*, N); eps a number or (*, 1)."""
        return torch.logsumexp(self._exponent(epsilon, log_b, g), -1).mul(-epsilon)

    def conditional(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """``P(j | i)``, shape (*, N, M): where the mass of x_i goes under the potential g."""
        return self._exponent(epsilon, log_b, g).softmax(-1)

    def softmin_and_conditional(
        self, epsilon: Tensor | float, log_b: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both of the above for little more than the time of one."""
        exponent = self._exponent(epsilon, log_b, g)
        largest = exponent.amax(-1, keepdim=True)
        share = exponent.sub_(largest).exp_()
        total = share.sum(-1, keepdim=True)
        share = share.div_(total)
        return (largest + total.log())[..., 0].mul(-epsilon), share

    def sweep(
        self, epsilon: Tensor | float, log_a: Tensor, log_b: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One round: ``f = softmin g``, (*, N), and the g that follows it where b > 0, (*, M)."""
        f, share = self.softmin_and_conditional(epsilon, log_b, g)
        reached = (share.transpose(-1, -2) @ log_a.exp()[..., None])[..., 0]
        return f, following(epsilon, log_b, g, reached)

    def average(self, epsilon: float, log_b: Tensor, g: Tensor, values: Tensor) -> Tensor:
        """``sum_j P(j | i) values_j``, shape (*, N)."""
        return (self.conditional(epsilon, log_b, g) @ values[..., None])[..., 0]

    def pull(self, epsilon: float, log_b: Tensor, g: Tensor) -> Tensor:
        """``sum_j P(j | i) grad_x c(x_i, y_j)``, shape (*, N, D): the gradient per unit of mass."""
        plan = self.conditional(epsilon, log_b, g)
        if self.p == 1:  # unit vectors, and 0 where the points meet
            inverse = torch.where(self.distance > 0, self.distance, 1.0).reciprocal()
            plan = torch.where(self.distance > 0, plan * inverse, 0.0)
        return plan.sum(-1, keepdim=True) * self.x - plan @ self.y
