"""When rounds that contract an error have done enough."""

from __future__ import annotations

import math

# Least part of its bound that the rounding of a pass takes as a rule.
_TYPICAL = 0.25
# Part of an error that a round leaves at least where rounding stops it.
_STALLED = 0.5


class Progress:
    """The errors of the rounds at one epsilon.

    Rounds that leave a part r of an error end that much before the solution: from an error e it is
    ``e r / (1 - r)`` away. So few rounds are needed where they contract fast, and more than an
    error below ``tol`` where not.
    """

    def __init__(self, tol: float, left: float = math.inf) -> None:
        """``tol`` is for the error, ``left`` for the way that is left."""
        self.tol, self.left, self.floor = tol, left, 0.0
        self._first = self._last = math.inf
        self._rounds = 0

    def ends(self, error: float) -> bool:
        """Note the error of a round; whether it was the last one.

        ``floor`` bounds the error that rounding makes: below it, rounds end once it shows.
        """
        before, self._last = self._last, error
        if self._rounds == 0:
            self._first = error
        self._rounds += 1
        if error <= max(_TYPICAL * self.floor, self.floor if error > _STALLED * before else 0.0):
            return True
        rate = 1.0
        if self._rounds > 1 and error < self._first:
            rate = (error / self._first) ** (1.0 / (self._rounds - 1))
        return error <= self.tol and error * rate / max(1.0 - rate, 1e-9) <= self.left
