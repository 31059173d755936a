"""The Gibbs kernel with all costs in memory, and the costs themselves."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest D for which squared distances come from differences, not from products: those lose half
# of the digits of the distance of points much nearer to each other than to the mean.
MAX_DIMENSION_OF_DIFFERENCES = 8
# Most costs kept in memory for D > 1: 2 MiB in float64, as much as a processor's own cache.
_MAX_COSTS = 512**2


def costs(x: Tensor, y: Tensor, p: int) -> Tensor:
    """Return ``|x_i - y_j|^p / p`` of x (*, N, D) and y (*, M, D), (*, N, M)."""
    if x.shape[-1] <= MAX_DIMENSION_OF_DIFFERENCES:
        square = squared_distances(x, y)
        return square.mul_(0.5) if p == 2 else square.sqrt_()
    if p == 1:
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    half_x, half_y = (0.5 * points.square().sum(-1) for points in (x, y))
    products = x @ y.transpose(-1, -2)
    return products.neg_().add_(half_x[..., :, None]).add_(half_y[..., None, :]).clamp_(min=0.0)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return ``|x_i - y_j|^2``, (*, N, M), to the last digits of the differences; for few D."""
    square = (x[..., :, 0, None] - y[..., None, :, 0]).square_()
    for k in range(1, x.shape[-1]):
        difference = x[..., :, k, None] - y[..., None, :, k]
        square.addcmul_(difference, difference)
    return square


class DenseKernel:
    """See `Kernel`; all N x M costs are in memory."""

    def __init__(self, x: Tensor, y: Tensor, p: int, cost: Tensor | None = None) -> None:
        """``cost`` (*, N, M), where it is known already."""
        self.x, self.y, self.p = x, y, p
        self.cost = costs(x, y, p) if cost is None else cost

    @staticmethod
    def fits(n: int, m: int) -> bool:
        """Whether so many costs may stay in memory."""
        return n * m <= _MAX_COSTS

    @property
    def transposed(self) -> DenseKernel:
        """The kernel from y to x, sharing the costs."""
        return DenseKernel(self.y, self.x, self.p, self.cost.transpose(-1, -2))

    def softmin_and_coupling(
        self, epsilon: Tensor | float, log_b: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the softmin (*, N) and ``P(j | i)``, (*, N, M): where the mass of x_i goes."""
        exponent = (log_b + g / epsilon)[..., None, :] - self.cost / epsilon
        largest = exponent.amax(-1, keepdim=True)
        weight = exponent.sub_(largest).exp_()
        total = weight.sum(-1, keepdim=True)
        return -epsilon * (largest + total.log())[..., 0], weight.div_(total)

    def softmin(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `Kernel.softmin`."""
        exponent = (log_b + g / epsilon)[..., None, :] - self.cost / epsilon
        return -epsilon * exponent.logsumexp(-1)

    def update(
        self, epsilon: Tensor | float, log_a: Tensor, log_b: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel.update`."""
        f = self.softmin(epsilon, log_b, g)
        return f, self.transposed.softmin(epsilon, log_a, f)

    def gradient(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `Kernel.gradient`."""
        _, coupling = self.softmin_and_coupling(epsilon, log_b, g)
        if self.p == 1:  # unit vectors, and 0 where the points meet
            coupling = torch.where(self.cost > 0, coupling / self.cost, 0.0)
            return coupling.sum(-1, keepdim=True) * self.x - coupling @ self.y
        return self.x - coupling @ self.y
