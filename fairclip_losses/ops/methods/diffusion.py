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

# Rounds after which the diffusion is measured anew: it changes with the plan.
_MEASURED_AFTER = frozenset({0, 1, 2, 4, 8, 16, 32, 64})
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
    conductance, taken = None, _rounds(options, watched)
    for k in range(taken):
        g = back.softmin(epsilon, log_a, f)
        following = kernel.softmin(epsilon, log_b, g)
        reached = (a * f).sum(-1) + (b * g).sum(-1)
        better = (reached >= value - 1e-12 * reached.abs())[..., None]
        # a round of its own never lowers the dual value: where the diffusion did, take it back
        miss = a * -torch.expm1((f - following) / epsilon)
        if watched and not bool((miss.abs().sum(-1) > options.tol).any()):
            f, taken = following, k + 1
            break
        if conductance is None or k in _MEASURED_AFTER:
            conductance = _conductance(kernel, f, g, log_a, log_b, epsilon)
        answer = share * _answer(kernel.x[..., 0], a, miss, conductance)
        f = torch.where(better, following + epsilon * answer, plain)
        plain = torch.where(better, following, plain)
        share = torch.where(better, (1.2 * share).clamp(max=_SHARE), 0.5 * share)
        value = torch.maximum(value, reached)
    else:
        if watched and bool((miss.abs().sum(-1) > options.tol).any()):
            warn_unconverged(float(miss.abs().sum(-1).max()), options, taken)
    return f, back.softmin(epsilon, log_a, f), taken


def _conductance(
    kernel: Kernel, f: Tensor, g: Tensor, log_a: Tensor, log_b: Tensor, epsilon: float
) -> Tensor:
    """Return the diffusion's conductance in the gaps between sorted points, (*, N - 1).

    With W the flow of mass from x_i to x_j of one round, it is the sum of ``W_ij (x_j - x_i)`` over
    the flows across a gap. From gap to gap that grows by ``a_i`` times the mean move from x_i.
    """
    points = kernel.x[..., 0]
    home = kernel.transposed.average(epsilon, log_a, f, points)  # E[x' | y]
    drift = log_a.exp() * (kernel.average(epsilon, log_b, g, home) - points)
    return along(drift, points.argsort(-1)).cumsum(-1)[..., :-1]


def _answer(points: Tensor, a: Tensor, miss: Tensor, conductance: Tensor) -> Tensor:
    """Return the stationary answer of the diffusion to sources ``miss``, in units of epsilon."""
    ordered, order = points.sort(-1)
    balanced = miss - a * miss.sum(-1, keepdim=True)
    flow = along(balanced, order).cumsum(-1)[..., :-1]
    conducting = conductance > 0
    slope = -flow * ordered.diff(dim=-1) / torch.where(conducting, conductance, 1.0)
    slope = torch.where(conducting, slope, 0.0).clamp(-_TRUST_BETWEEN, _TRUST_BETWEEN)
    answer = unsort(torch.nn.functional.pad(slope.cumsum(-1), (1, 0)), order)
    answer = answer - (a * answer).sum(-1, keepdim=True)
    longest = answer.abs().amax(-1, keepdim=True)
    return answer * (_TRUST / longest.clamp(min=_TRUST))


def _rounds(options: SinkhornOptions, watched: bool) -> int:
    if options.iterations is not None:
        return options.iterations
    return min(_ROUNDS, options.max_iterations) if watched else _UNWATCHED_ROUNDS
