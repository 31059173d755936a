"""The Gibbs kernel of p = 1 on a line by prefix sums: O(N) an update, nothing of size N x M.

To the left of x the kernel is ``exp(y / eps) exp(-x / eps)``, to the right the reverse, so sums of
it over sorted points are running sums. They run in the log domain: exact at any blur, with an error
of the potentials near ``rounding * diameter``, not ``rounding * diameter / eps``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import broadcast_shapes
from ..exact import along


class LaplaceLine:
    """The kernel ``exp(-|x_i - y_j| / eps)`` between x (*, N, 1) and y (*, M, 1).

    Both directions are summed at once, in the second to last place of tensors (*, 2, M): the sums
    from the left, and those from the right along the reversed line.
    """

    p = 1
    rounding, unit, spare = 0.0, 0.0, 1.0  # none to speak of, and `DenseKernel.spare`

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        sorted_y, order = y[..., 0].sort(dim=-1)
        lead = broadcast_shapes(x.shape[:-2], y.shape[:-2])
        points = x[..., 0].expand(*lead, -1).contiguous()
        ladder = sorted_y.expand(*lead, -1).contiguous()
        below = torch.searchsorted(ladder, points, right=False)  # how many y < x_i
        up_to = torch.searchsorted(ladder, points, right=True)  # how many y <= x_i
        above = y.shape[-2] - up_to  # how many y > x_i
        self._order = torch.stack([order, order.flip(-1)], -2)
        self._heights = torch.stack([sorted_y, -sorted_y.flip(-1)], -2)
        self._shifts = torch.stack([-points, points], -2)
        self._all, self._apart = torch.stack([up_to, above], -2), torch.stack([below, above], -2)
        self._scaled: tuple[float, Tensor, Tensor] | None = None
        self._other: LaplaceLine | None = None

    @property
    def transposed(self) -> LaplaceLine:
        """The kernel from y to x."""
        if self._other is None:
            self._other = LaplaceLine(self.y, self.x)
            self._other._other = self
        return self._other

    def softmin(self, epsilon: float, log_b: Tensor, g: Tensor) -> Tensor:
        """``-eps log sum_j b_j exp((g_j - C_ij) / eps)``, shape (*, N)."""
        return self._read(self._running(epsilon, log_b, g), self._all).mul_(-epsilon)

    def average(self, epsilon: float, log_b: Tensor, g: Tensor, values: Tensor) -> Tensor:
        """``sum_j P(j | i) values_j``, shape (*, N)."""
        low = values.amin(-1, keepdim=True)
        weighted = self._read(self._running(epsilon, log_b + (values - low).log(), g), self._all)
        total = self._read(self._running(epsilon, log_b, g), self._all)
        return low + (weighted - total).exp_()

    def pull(self, epsilon: float, log_b: Tensor, g: Tensor) -> Tensor:
        """``sum_j P(j | i) sign(x_i - y_j)``, shape (*, N, 1): the gradient per unit of mass."""
        sums = self._running(epsilon, log_b, g)
        total = self._read(sums, self._all)
        left, right = self._sides(sums, self._apart)
        return ((left - total).exp_() - (right - total).exp_())[..., None]

    def _running(self, epsilon: float, log_b: Tensor, g: Tensor) -> Tensor:
        """Return the logarithms of the running sums, (*, 2, M + 1), the first of no points."""
        if self._scaled is None or self._scaled[0] != epsilon:
            self._scaled = epsilon, self._heights / epsilon, self._shifts / epsilon
        exponent = torch.add(log_b, g, alpha=1.0 / epsilon)
        ordered = along(exponent[..., None, :], self._order) + self._scaled[1]
        return torch.nn.functional.pad(ordered.logcumsumexp(-1), (1, 0), value=-torch.inf)

    def _sides(self, sums: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Read the sums at as many points from either end, moved to where x is, (*, N) each."""
        assert self._scaled is not None
        left, right = (along(sums, places) + self._scaled[2]).unbind(-2)
        return left, right

    def _read(self, sums: Tensor, places: Tensor) -> Tensor:
        """Return the logarithm of what both sides add up to, (*, N)."""
        return torch.logaddexp(*self._sides(sums, places))
