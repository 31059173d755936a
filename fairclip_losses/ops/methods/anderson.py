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

from ..checks import is_readable

# Rounds that are remembered.
_MEMORY = 20
# Longest change beyond a plain round, in units of epsilon.
_TRUST = 5.0
# What makes the Gram matrix of the residuals' unit differences regular, and fills the diagonal of
# those that a row has forgotten.
_RIDGE, _FORGOTTEN = 1e-12, 0.5


class Anderson:
    """The memory of one fixed-point iteration over rows of potentials g (*, M)."""

    def __init__(self, log_b: Tensor, rounding: float = 0.0) -> None:
        """``rounding`` is the error of the dual's values, in their unit."""
        self._b, self._rounding = log_b.exp(), rounding
        self._root = self._b.sqrt()
        self._rounds = 0
        # differences of the images of neighbouring iterates, and of their residuals
        self._moves = self._changes = log_b.new_empty(*log_b.shape[:-1], 0, log_b.shape[-1])
        self._image = self._residual = self._value = log_b.new_empty(0)

    def step(self, g: Tensor, image: Tensor, value: Tensor, epsilon: Tensor | float) -> Tensor:
        """Return the next iterate after g, whose plain round gave ``image``.

        ``value`` (*,) is the dual's at g. A row whose value fell goes back to the image of the
        iterate before, and forgets.
        """
        residual = (image - g) * self._root
        self._rounds += 1
        if self._rounds == 1:
            self._image, self._residual, self._value = image, residual, value
            return image
        fell = value < self._value - (1e-13 * value.abs() + self._rounding)
        some_fell = not is_readable(fell) or bool(fell.any())
        self._remember(image - self._image, residual - self._residual)
        if some_fell:
            for memory in (self._moves, self._changes):
                memory.masked_fill_(fell[..., None, None], 0.0)
        combined = image - self._excess(residual, epsilon)
        if some_fell:
            fell, back = fell[..., None], self._image
            combined = torch.where(fell, back, combined)
            image, residual = (
                torch.where(fell, back, image),
                torch.where(fell, self._residual, residual),
            )
            value = torch.maximum(value, self._value)
        self._image, self._residual, self._value = image, residual, value
        return combined

    def _remember(self, move: Tensor, change: Tensor) -> None:
        entry = (self._rounds - 2) % _MEMORY
        if self._rounds == 2 or entry == self._moves.shape[-2]:  # twice as much, as need be
            size = min(max(4, 2 * entry), _MEMORY)
            moves = move.new_empty(*move.shape[:-1], size, move.shape[-1])
            changes = torch.empty_like(moves)
            moves[..., :entry, :], changes[..., :entry, :] = self._moves, self._changes
            self._moves, self._changes = moves, changes
        self._moves[..., entry, :], self._changes[..., entry, :] = move, change

    def _excess(self, residual: Tensor, epsilon: Tensor | float) -> Tensor:
        """Return what the combination that leaves the least residual takes off the image."""
        known = min(self._rounds - 1, _MEMORY)
        moves, changes = self._moves[..., :known, :], self._changes[..., :known, :]
        gram = changes @ changes.transpose(-1, -2)
        size = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        inverse = torch.where(size > 0, size, 1.0).reciprocal()
        gram = gram * inverse[..., None] * inverse[..., None, :]
        gram.diagonal(dim1=-2, dim2=-1).add_(_RIDGE).clamp_(min=_FORGOTTEN)
        right = (changes @ residual[..., None]) * inverse[..., None]
        weights, _ = torch.linalg.solve_ex(gram, right)
        weights = weights * inverse[..., None]
        excess = (weights.transpose(-1, -2) @ moves)[..., 0, :]
        excess = excess - (self._b * excess).sum(-1, keepdim=True)
        longest = excess.abs().amax(-1, keepdim=True) / epsilon
        excess = excess * (_TRUST / longest.clamp(min=_TRUST))
        return torch.where(excess.isfinite(), excess, 0.0)
