"""Alternate updates of the potentials, accelerated by what their last rounds have in common.

A round contracts the error of slow modes by ``1 - O(eps)``. Anderson's method combines the last
rounds so that their residuals cancel; on the linear map that a round is near the optimum, it is
GMRES, and takes the square root of the rounds. Far from there it may err: a combination that lowers
the dual's value is taken back, which a plain round never does.

Source: Walker and Ni 2011, "Anderson acceleration for fixed-point iterations".
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rounds that are remembered.
_MEMORY = 20
# Longest change beyond a plain round, in units of epsilon.
_TRUST = 5.0
# What makes the Gram matrix of the residuals' unit differences regular, and fills the diagonal of
# those that a row has forgotten.
_RIDGE, _FORGOTTEN = 1e-12, 0.5


class Anderson:
    """The memory of one fixed-point iteration over rows of potentials g (*, M)."""

    def __init__(self, log_b: Tensor) -> None:
        self._b = log_b.exp()
        self._moves: list[Tensor] = []  # differences of the images of neighbouring iterates
        self._changes: list[Tensor] = []  # differences of their residuals, times sqrt(b)
        self._image: Tensor | None = None
        self._residual: Tensor | None = None
        self._value: Tensor | None = None

    def step(self, g: Tensor, image: Tensor, value: Tensor, epsilon: Tensor | float) -> Tensor:
        """Return the next iterate after g, whose plain round gave ``image``.

        ``value`` (*,) is the dual's at g. A row whose value fell goes back to the image of the
        iterate before, and forgets.
        """
        residual = (image - g) * self._b.sqrt()
        if self._image is None or self._residual is None or self._value is None:
            self._image, self._residual, self._value = image, residual, value
            return image
        slack = 1e-13 * torch.maximum(value.abs(), self._value.abs())
        fell = (value < self._value - slack)[..., None]
        self._remember(image - self._image, residual - self._residual, ~fell)
        combined = image - self._excess(residual, epsilon)
        back = self._image
        self._image = torch.where(fell, back, image)
        self._residual = torch.where(fell, self._residual, residual)
        self._value = torch.maximum(value, self._value)
        return torch.where(fell, back, combined)

    def _remember(self, move: Tensor, change: Tensor, kept: Tensor) -> None:
        self._moves.append(move)
        self._changes.append(change)
        if len(self._moves) > _MEMORY:
            del self._moves[0], self._changes[0]
        self._moves = [torch.where(kept, entry, 0.0) for entry in self._moves]
        self._changes = [torch.where(kept, entry, 0.0) for entry in self._changes]

    def _excess(self, residual: Tensor, epsilon: Tensor | float) -> Tensor:
        """Return what the combination that leaves the least residual takes off the image."""
        moves, changes = torch.stack(self._moves, -1), torch.stack(self._changes, -1)
        size = torch.linalg.vector_norm(changes, dim=-2, keepdim=True)
        inverse = torch.where(size > 0, size, 1.0).reciprocal()
        moves, changes = moves * inverse, changes * inverse
        gram = changes.transpose(-1, -2) @ changes
        gram.diagonal(dim1=-2, dim2=-1).add_(_RIDGE).clamp_(min=_FORGOTTEN)
        right = changes.transpose(-1, -2) @ residual[..., None]
        weights, _ = torch.linalg.solve_ex(gram, right)
        excess = (moves @ weights)[..., 0]
        excess = excess - (self._b * excess).sum(-1, keepdim=True)
        longest = excess.abs().amax(-1, keepdim=True) / epsilon
        excess = excess * (_TRUST / longest.clamp(min=_TRUST))
        return torch.where(excess.isfinite(), excess, 0.0)
