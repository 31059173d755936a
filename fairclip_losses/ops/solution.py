"""What the entropic solvers return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Slopes = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class EntropicSolution(NamedTuple):
    """A solved divergence; all of it is in the working precision and carries no gradient."""

    cost: Tensor  # (*,) the divergence
    slopes: Slopes  # its derivatives a row in x, y, a and b; None where not wanted
    transport_cost: Tensor  # (*,) OT_eps(a, b)
    f: Tensor  # (*, N) potentials between a and b
    g: Tensor  # (*, M)
    f_self: Tensor | None  # (*, N) potential of OT_eps(a, a), None without debiasing
    g_self: Tensor | None  # (*, M)
    rounds: int  # taken between a and b
