"""Alternate updates on a line, led by the diffusion that their slow modes follow.

A round of alternate updates moves an error of the potential as one step of a random walk does:
from x to where the plan sends it, and back. What the walk spreads slowly, over lengths far above
one step, the rounds remove slowly: in 1 / eps of them. At those lengths the walk is a diffusion,
which two running sums invert on a line. So each round adds, to its own step, the answer of the
diffusion to the mass still in the wrong place: 10 to 40 rounds do where thousands did, at any
blur, and a round stays O(N).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import warn_unconverged
from ..exact import along, unsort
from ..kernels.kinds import Kernel
from ..options import SinkhornOptions

# Rounds after which the diffusion is measured anew, as it changes with the plan: the first ones,
# and of the others every so many.
_MEASURED_FIRST, _MEASURED_EVERY = 3, 3
# Part of the diffusion's answer that is taken: all of it overshoots at the length of one step.
_SHARE = 0.7
# Longest change by it, in units of epsilon, between two neighbouring points and at all.
_TRUST_BETWEEN, _TRUST = 3.0, 5.0
_ROUNDS, _UNWATCHED_ROUNDS = 100, 80


def diffusion_rounds(
    kernel: Kernel, g: Tensor, log_a: Tensor, log_b: Tensor, options: SinkhornOptions
) -> tuple[Tensor, Tensor, int]:
    """Return the potentials f and g of ``OT_eps(a, b)``, from a near g, and the rounds taken."""
    epsilon, back = options.epsilon, kernel.transposed
    watched = options.is_watched(kernel.x)
    a, b = log_a.exp(), log_b.exp()
    f = kernel.softmin(epsilon, log_b, g)
    plain, value = f, torch.full_like((a * f).sum(-1), -torch.inf)
    share = torch.full_like(value, _SHARE)[..., None]
    ladder, conductance, taken = _Ladder(kernel.x[..., 0], a), None, _rounds(options, watched)
    for k in range(taken):
        g = back.softmin(epsilon, log_a, f)
        following = kernel.softmin(epsilon, log_b, g)
        reached = (a * f).sum(-1) + (b * g).sum(-1)
        better = (reached >= torch.sub(value, reached.abs(), alpha=1e-12))[..., None]
        # a round of its own never lowers the dual value: where the diffusion did, take it back
        miss = torch.expm1((f - following).div_(epsilon)).mul_(a).neg_()
        if watched and not bool((miss.abs().sum(-1) > options.tol).any()):
            f, taken = following, k + 1
            break
        if conductance is None or k < _MEASURED_FIRST or k % _MEASURED_EVERY == 0:
            conductance = ladder.conductance(_moves(kernel, f, g, log_a, log_b, epsilon))
        answer = share * ladder.answer(miss, conductance)
        f = torch.where(better, torch.add(following, answer, alpha=epsilon), plain)
        plain = torch.where(better, following, plain)
        share = torch.where(better, (1.2 * share).clamp_(max=_SHARE), 0.5 * share)
        value = torch.maximum(value, reached)
    else:
        if watched and bool((miss.abs().sum(-1) > options.tol).any()):
            warn_unconverged(float(miss.abs().sum(-1).max()), options, taken)
    return f, back.softmin(epsilon, log_a, f), taken


def _moves(
    kernel: Kernel, f: Tensor, g: Tensor, log_a: Tensor, log_b: Tensor, epsilon: float
) -> Tensor:
    """Return by how far one round moves the mass of each point on average, (*, N)."""
    points = kernel.x[..., 0]
    home = kernel.transposed.average(epsilon, log_a, f, points)  # E[x' | y]
    return kernel.average(epsilon, log_b, g, home) - points


class _Ladder:
    """The points of a measure in order, and the diffusion between neighbours."""

    def __init__(self, points: Tensor, weights: Tensor) -> None:
        """Points (*, N) and weights (*, N)."""
        ordered, self._order = points.sort(-1)
        self._gaps, self._weights = ordered.diff(dim=-1), weights

    def conductance(self, moves: Tensor) -> Tensor:
        """Return that of the gaps, (*, N - 1), and where there is none a negative number.

        With W the flow of mass from x_i to x_j of one round, it is the sum of ``W_ij (x_j - x_i)``
        over the flows across a gap. From gap to gap that grows by mass times mean move.
        """
        found = along(self._weights * moves, self._order).cumsum(-1)[..., :-1]
        return torch.where(found > 0, found, -torch.inf)

    def answer(self, miss: Tensor, conductance: Tensor) -> Tensor:
        """Return the stationary answer to sources ``miss`` (*, N), in units of epsilon."""
        a = self._weights
        balanced = miss - a * miss.sum(-1, keepdim=True)
        flow = along(balanced, self._order).cumsum(-1)[..., :-1]
        slope = (flow * self._gaps).div_(conductance).neg_()
        slope = slope.clamp_(-_TRUST_BETWEEN, _TRUST_BETWEEN)
        answer = unsort(torch.nn.functional.pad(slope.cumsum(-1), (1, 0)), self._order)
        answer = answer - (a * answer).sum(-1, keepdim=True)
        longest = answer.abs().amax(-1, keepdim=True)
        return answer * (_TRUST / longest.clamp_(min=_TRUST))


def _rounds(options: SinkhornOptions, watched: bool) -> int:
    if options.iterations is not None:
        return options.iterations
    return min(_ROUNDS, options.max_iterations) if watched else _UNWATCHED_ROUNDS
