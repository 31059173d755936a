"""The log-domain Sinkhorn algorithm: eps-scaling, alternating updates, acceleration.

For ``OT_eps(a, b) = max_{f, g} <a, f> + <b, g>`` (while a marginal holds) an iteration is

    f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps)
    g_j = -eps log sum_i a_i exp((f_i - C_ij) / eps)

The first epsilon is the diameter^p, each next one smaller, the last the target: from the potentials
of the one before few iterations are needed. Of these Anderson's method takes the square root.

Sources: Peyre and Cuturi 2019 (arXiv:1803.00567), section 4.4; Schmitzer 2019 (arXiv:1610.06519)
for eps-scaling; Walker and Ni 2011, "Anderson acceleration for fixed-point iterations".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..validation import is_readable
from .options import Kernel, SinkhornOptions, warn_unconverged

# Where nobody may look at the convergence, on accelerators: iterations at the target; the ratio of
# diameter and blur that eps-scaling goes through; iterations of a self-term, which leave 1e-11 of
# the first one's error.
_FIXED_ITERATIONS, _FIXED_RANGE, _FIXED_SELF_ITERATIONS = 100, 1e4, 9
# Marginal error at which an epsilon above the target is done with, and its most iterations.
_STAGE_TOL, _STAGE_ITERATIONS = 0.03, 100
# Iterations in which an error that rounding does not hold up falls by half at least.
_STALLED_ITERATIONS = 5
# Iterations go on until what they would still change is below this part of tol: a small marginal
# error is a large one of the potentials where they contract slowly.
_REMAINING_TOL_FACTOR = 1e-2
# Iterations that Anderson's method combines; more make its equations singular.
_ANDERSON_MEMORY = 20
# Longest change beyond a plain update, in units of epsilon: far away the map is not linear.
_MAX_STEP_EPS = 5.0
# Added to the Gram matrix of unit vectors, so that it can be solved; its least diagonal entry, 0
# where a row has forgotten.
_GRAM_RIDGE, _MIN_GRAM_DIAGONAL = 1e-12, 0.5


class Potentials(NamedTuple):
    """Potentials f (*, N) and g (*, M), its c-transform."""

    f: Tensor
    g: Tensor
    iterations: int
    marginal_error: float | None  # the worst row's, where it was looked at


def sinkhorn_loop(
    kernel: Kernel, log_a: Tensor, log_b: Tensor, options: SinkhornOptions, max_iterations: int
) -> Potentials:
    """Solve ``OT_eps(a, b)`` in about ``max_iterations`` iterations at most.

    With ``options.iterations`` there are exactly so many: one at each epsilon above the target, as
    far as they go, and the others at the target.
    """
    watched = options.is_watched(kernel.x)
    *stages, target = epsilon_schedule(kernel.x, kernel.y, options, options.scaling)
    left = options.iterations or (max_iterations if watched else len(stages) + _FIXED_ITERATIONS)
    plan = [(epsilon, _STAGE_TOL, _STAGE_ITERATIONS if watched else 1) for epsilon in stages]
    quick, quick_tol = kernel.lead_in(options.epsilon) or (kernel, None)
    if quick_tol is not None:
        plan.append((target, max(quick_tol, options.tol), left))
    g, taken = torch.zeros_like(log_b), 0
    for epsilon, tol, most in plan:
        if taken + 1 >= left:
            break
        near = partial(is_near, tol=tol) if watched else None
        led = _iterate(quick, log_a, log_b, g, epsilon, min(most, left - taken - 1), near)
        g, taken = led.g, taken + led.iterations
    converged = partial(is_converged, tol=options.tol) if watched else None
    found = _iterate(kernel, log_a, log_b, g, target, left - taken, converged)
    g = _complete(kernel, log_a, log_b, found.f, found.g, options)
    return found._replace(g=g, iterations=taken + found.iterations)


def _complete(
    kernel: Kernel, log_a: Tensor, log_b: Tensor, f: Tensor, g: Tensor, options: SinkhornOptions
) -> Tensor:
    """Return the c-transform of f, which is g but where b is 0."""
    if is_readable(f) and not (log_b == -torch.inf).any():
        return g
    return kernel.transposed.softmin(options.epsilon, log_a, f)


def epsilon_schedule(
    x: Tensor, y: Tensor, options: SinkhornOptions, scaling: float
) -> list[Tensor | float]:
    """Return the values of eps-scaling from the diameter^p on; the last one is the target's.

    The length scale ``eps^(1 / p)`` shrinks by ``scaling``. It is not read back from a device.
    """
    low = torch.minimum(x.amin(-2), y.amin(-2))
    diameter = torch.linalg.vector_norm(torch.maximum(x.amax(-2), y.amax(-2)) - low, dim=-1).amax()
    readable = is_readable(x)
    ratio = float(diameter) / options.blur if readable else _FIXED_RANGE
    scales = [scaling**k for k in range(math.ceil(math.log(max(ratio, 1.0)) / -math.log(scaling)))]
    if readable:
        return [*((float(diameter) * s) ** options.p for s in scales), options.epsilon]
    above = [(diameter * s).clamp(min=options.blur) ** options.p for s in scales]
    return [*above, options.epsilon]


def marginal_error(
    weights: Tensor, potential: Tensor, c_transform: Tensor, epsilon: Tensor | float
) -> Tensor:
    """Return the L1 error (*,) of the marginal ``weights exp((potential - c_transform) / eps)``."""
    return (weights * torch.expm1((potential - c_transform) / epsilon).abs()).sum(-1)


def _iterate(
    kernel: Kernel, log_a: Tensor, log_b: Tensor, g: Tensor, epsilon: Tensor | float,
    max_iterations: int, is_done: Callable[[list[float]], bool] | None,
) -> Potentials:  # fmt: skip
    """Iterate at one epsilon from g on, until the marginal errors are done (None: untested)."""
    a, b = log_a.exp(), log_b.exp()
    anderson, errors = Anderson(b), list[float]()
    for k in range(max_iterations):
        f, g_next = kernel.update(epsilon, log_a, log_b, g)
        if is_done is not None:
            errors.append(float(marginal_error(b, g, g_next, epsilon).max()))
            if is_done(errors):
                break
        if k + 1 < max_iterations:
            g = anderson.step(g, g_next, (a * f).sum(-1) + (b * g).sum(-1), epsilon)
    return Potentials(f, g_next, k + 1, errors[-1] if errors else None)


def is_near(errors: list[float], tol: float) -> bool:
    """Whether iterations that only lead on are done: below ``tol``, or no better for a while."""
    recent, before = errors[-_STALLED_ITERATIONS:], errors[:-_STALLED_ITERATIONS]
    return errors[-1] <= tol or (len(before) > 0 and min(recent) > 0.5 * min(before))


def is_converged(errors: list[float], tol: float) -> bool:
    """Whether the last error e is below ``tol``, and ``e r / (1 - r)``, what is left, at rate r."""
    first, last = errors[0], errors[-1]
    if not last <= tol:
        return False
    rate = (last / first) ** (1.0 / (len(errors) - 1)) if last < first else 0.0
    return last * rate / max(1.0 - rate, 1e-9) <= _REMAINING_TOL_FACTOR * tol


class Anderson:
    """Acceleration of a fixed-point iteration over rows of potentials g (*, M).

    It combines the last updates so that their residuals cancel, GMRES where the map is linear. If
    that lowers the dual value, as no plain update does, a row goes back to that update and forgets.
    """

    def __init__(self, b: Tensor) -> None:
        self._b, self._root = b, b.sqrt()
        self._moves: list[Tensor] = []  # differences of neighbouring updates, (*, M) each
        self._changes: list[Tensor] = []  # and of their residuals
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # update, residual, dual value

    def step(self, g: Tensor, update: Tensor, value: Tensor, epsilon: Tensor | float) -> Tensor:
        """Return the next iterate after g, whose plain update is given; ``value`` (*,) is g's."""
        residual = (update - g) * self._root
        if self._last is None:
            self._last = update, residual, value
            return update
        last_update, last_residual, last_value = self._last
        fell = (value < last_value - 1e-13 * value.abs())[..., None]
        for memory, new in (
            (self._moves, update - last_update), (self._changes, residual - last_residual),
        ):  # fmt: skip
            memory.append(new)
            memory[:] = [torch.where(fell, 0.0, old) for old in memory[-_ANDERSON_MEMORY:]]
        combined = torch.where(fell, last_update, update - self._excess(residual, epsilon))
        kept = torch.where(fell, last_update, update), torch.where(fell, last_residual, residual)
        self._last = *kept, torch.maximum(value, last_value)
        return combined

    def _excess(self, residual: Tensor, epsilon: Tensor | float) -> Tensor:
        """Return what the combination of least residual takes off the plain update."""
        moves, changes = torch.stack(self._moves, -2), torch.stack(self._changes, -2)
        norm = changes.norm(dim=-1)
        inverse = torch.where(norm > 0, norm, 1.0).reciprocal()
        unit = changes * inverse[..., None]
        gram = unit @ unit.transpose(-1, -2)
        gram.diagonal(dim1=-2, dim2=-1).add_(_GRAM_RIDGE).clamp_(min=_MIN_GRAM_DIAGONAL)
        weights, _ = torch.linalg.solve_ex(gram, unit @ residual[..., None])
        excess = ((weights[..., 0] * inverse)[..., None, :] @ moves)[..., 0, :]
        excess = excess - (self._b * excess).sum(-1, keepdim=True)
        longest = excess.abs().amax(-1, keepdim=True) / epsilon
        excess = excess * (_MAX_STEP_EPS / longest.clamp(min=_MAX_STEP_EPS))
        return torch.where(excess.isfinite(), excess, 0.0)


def symmetric_loop(
    kernel: Kernel, log_a: Tensor, options: SinkhornOptions
) -> tuple[Tensor, Tensor]:
    """Return the potential f of ``OT_eps(a, a)`` and that cost, ``<a, f' + f''>``, a dual value.

    The c-transform has derivative -Q with eigenvalues q in [0, 1], so of the combinations of f, f'
    and f'' that keep the solution ``(f + 8 f' + 8 f'') / 17`` is the best: it contracts by
    ``max |1 - 8 q + 8 q^2| / 17 = 1 / 17``, at any epsilon, so no eps-scaling is needed.
    """
    a, tested = log_a.exp(), is_readable(kernel.x)
    most = options.iterations or (options.max_iterations if tested else _FIXED_SELF_ITERATIONS)
    f, taken, errors = torch.zeros_like(log_a), 0, [0.0]
    for each, tol in filter(None, (kernel.lead_in(options.epsilon), (kernel, options.tol))):
        done, errors = is_converged if each is kernel else is_near, []
        while taken < most - (each is not kernel):
            f_1, f_2 = each.update(options.epsilon, log_a, log_a, f)
            taken += 1
            if tested:
                errors.append(float(marginal_error(a, f, f_1, options.epsilon).max()))
                if done(errors, tol):
                    break
            # far from the solution the plain average is the surer
            f = 0.5 * (f_1 + f_2) if taken == 1 else (f + 8.0 * f_1 + 8.0 * f_2) / 17.0
    if options.is_watched(kernel.x):
        warn_unconverged(errors[-1], options, taken)
    f = 0.5 * (f_1 + f_2)
    return _complete(kernel, log_a, log_a, f, f, options), 2.0 * (a * f).sum(-1)
