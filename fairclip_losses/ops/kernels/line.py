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
    """The kernel ``exp(-|x_i - y_j| / eps)`` between x (*, N, 1) and y (*, M, 1)."""

    p = 1
    rounding, unit, spare = 0.0, 0.0, 1.0  # none to speak of, and `DenseKernel.spare`

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self._sorted_y, self._order = y[..., 0].sort(dim=-1)
        lead = broadcast_shapes(x.shape[:-2], y.shape[:-2])
        points = x[..., 0].expand(*lead, -1).contiguous()
        ladder = self._sorted_y.expand(*lead, -1).contiguous()
        self._below = torch.searchsorted(ladder, points, right=False)  # how many y < x_i
        self._up_to = torch.searchsorted(ladder, points, right=True)  # how many y <= x_i
        self._other: LaplaceLine | None = None

    @property
    def transposed(self) -> LaplaceLine:
        """The kernel from y to x."""
        if self._other is None:
            self._other = LaplaceLine(self.y, self.x)
            self._other._other = self
        return self._other

    def softmin(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """``-eps log sum_j b_j exp((g_j - C_ij) / eps)``, shape (*, N)."""
        left, right = self._running(epsilon, log_b + g / epsilon)
        return torch.logaddexp(left(self._up_to), right(self._up_to)).mul(-epsilon)

    def average(self, epsilon: float, log_b: Tensor, g: Tensor, values: Tensor) -> Tensor:
        """``sum_j P(j | i) values_j``, shape (*, N)."""
        low = values.amin(-1, keepdim=True)
        weighted = self.softmin(epsilon, log_b + (values - low).log(), g)
        return low + ((self.softmin(epsilon, log_b, g) - weighted) / epsilon).exp()

    def pull(self, epsilon: float, log_b: Tensor, g: Tensor) -> Tensor:
        """``sum_j P(j | i) sign(x_i - y_j)``, shape (*, N, 1): the gradient per unit of mass."""
        left, right = self._running(epsilon, log_b + g / epsilon)
        total = torch.logaddexp(left(self._up_to), right(self._up_to))
        toward = (left(self._below) - total).exp() - (right(self._up_to) - total).exp()
        return toward[..., None]

    def _running(self, epsilon: Tensor | float, exponent: Tensor) -> tuple[_Running, _Running]:
        scaled_y = self._sorted_y / epsilon
        scaled_x = self.x[..., 0] / epsilon
        exponent = along(exponent, self._order)
        pad = torch.nn.functional.pad
        rising = pad((exponent + scaled_y).logcumsumexp(-1), (1, 0), value=-torch.inf)
        falling = (exponent - scaled_y).flip(-1).logcumsumexp(-1).flip(-1)
        return (
            _Running(rising, -scaled_x),
            _Running(pad(falling, (0, 1), value=-torch.inf), scaled_x),
        )


class _Running:
    """Running log-sums over the sorted points, read at places of them and moved to the targets."""

    def __init__(self, sums: Tensor, shift: Tensor) -> None:
        self.sums, self.shift = sums, shift

    def __call__(self, places: Tensor) -> Tensor:
        return along(self.sums, places) + self.shift
