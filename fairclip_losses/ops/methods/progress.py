"""When rounds that contract an error have done enough."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

# Least part of its bound that the rounding of a pass takes as a rule.
_TYPICAL = 0.25
# What rounding adds to it besides that of the costs, in units of the last place: the logarithms of
# the weights are rounded too, and the sums.
_OF_SUMS = 8.0
# Rounds of a rough kernel within which the least error must fall below this part of itself.
PATIENCE, _FALLEN = 10, 0.95
# Part of an error that a round leaves at least where rounding stops it.
_STALLED = 0.5


def missed(weights: Tensor, potential: Tensor, due: Tensor, epsilon: Tensor | float) -> Tensor:
    """Return the L1 error (*,) of a plan's marginal.

    ``due`` is the potential that would meet the weights instead: under ``potential`` the plan gives
    the points ``weights exp((potential - due) / eps)``.
    """
    return (weights * torch.expm1((potential - due) / epsilon).abs()).sum(-1)


def marginal_error(
    weights: Tensor, potential: Tensor, due: Tensor, epsilon: Tensor | float
) -> float:
    """Return the error of `missed`, the worst row's, read back."""
    miss = missed(weights, potential, due, epsilon)
    return float(miss.max()) if miss.numel() else 0.0


class _Rounds(Protocol):
    """A kernel, by what its rounding is."""

    @property
    def rounding(self) -> float: ...

    @property
    def unit(self) -> float: ...


class Progress:
    """The errors of the rounds at one epsilon.

    Rounds that leave a part r of an error end that much before the solution: from an error e it is
    ``e r / (1 - r)`` away. So few rounds are needed where they contract fast, and more than an
    error below ``tol`` where not.
    """

    def __init__(self, tol: float, left: float = math.inf) -> None:
        """``tol`` is for the error, ``left`` for the way that is left."""
        self.tol, self.left, self.floor = tol, left, 0.0
        self.patience = math.inf  # for the rounds of a kernel that a better one follows
        self._first = self._last = self._least = math.inf
        self._rounds = self._since_least = 0

    def expect_rounding(self, kernel: _Rounds, epsilon: Tensor | float) -> None:
        """Take what rounding the kernel's rounds have from now on; none for rows of epsilons."""
        self.floor = 0.0
        if isinstance(epsilon, float):
            self.floor = kernel.rounding / epsilon + _OF_SUMS * kernel.unit

    def ends(self, error: float) -> bool:
        """Note the error of a round; whether it was the last one.

        ``floor`` bounds the error that rounding makes: below it, rounds end once it shows.
        """
        before, self._last = self._last, error
        if self._rounds == 0:
            self._first = error
        self._rounds += 1
        typical = _TYPICAL * self.floor  # a bound that is too high may be no reason to miss tol
        typical = typical if self.patience < math.inf else min(typical, self.tol)
        if error <= max(typical, self.floor if error > _STALLED * before else 0.0):
            return True
        self._since_least += 1
        if error < _FALLEN * self._least:
            self._least, self._since_least = error, 0
        if self._since_least >= self.patience:
            return True
        rate = 1.0
        if self._rounds > 1 and error < self._first:
            rate = (error / self._first) ** (1.0 / (self._rounds - 1))
        return error <= self.tol and error * rate / max(1.0 - rate, 1e-9) <= self.left
