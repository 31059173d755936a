"""Newton's method on the dual, for problems whose plan fits in memory.

Alternate updates contract by 1 - O(eps) a round, so thousands of rounds lie between a small blur
and gradients that are right; the semi-dual is smooth and concave, and Newton needs about eight,
up to sixteen where groups are small or clusters hardly couple.
A round costs one exponential per pair of points, one matrix product and one Cholesky factor, of
which none waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import warn_unconverged
from ..kernels.dense import DenseKernel, following
from ..options import SinkhornOptions
from .annealing import Annealing, Behind
from .progress import marginal_error

# Longest change of one entry of a potential in the first round, in units of epsilon, by what it
# grows with a step of use and shrinks with one of none; the damping of modes, first and least.
_LONGEST, _GROWN, _SHRUNK = 5.0, 2.0, 0.5
_DAMPING, _LEAST_DAMPING = 1e-3, 1e-12
# Most points on the smaller side of a problem that Newton's method is used for, and most on a line,
# where nothing else is as sure.
_MOST_POINTS, _MOST_POINTS_ON_A_LINE = 512, 1024
# Most rounds at the target, and at a larger epsilon on the way down to it, where `_TOL_ON_THE_WAY`
# is near enough; and their numbers where nothing may be read back from the device.
_ROUNDS, _ROUNDS_ON_THE_WAY, _TOL_ON_THE_WAY = 200, 60, 1e-3
_UNWATCHED_ROUNDS, _UNWATCHED_ROUNDS_ON_THE_WAY = 16, 4


def fits_newton(x: Tensor, y: Tensor) -> bool:
    """Whether the plan between x (*, N, D) and y (*, M, D) is small enough to be factored."""
    n, m = x.shape[-2], y.shape[-2]
    most = _MOST_POINTS_ON_A_LINE if x.shape[-1] == 1 else _MOST_POINTS
    return min(n, m) <= most and n * m <= most**2


def newton_pair(
    kernel: DenseKernel, f: Tensor, log_a: Tensor, log_b: Tensor, options: SinkhornOptions,
    epsilon: Tensor | float | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """Return the f that maximises the semi-dual ``<a, f> + <b, softmin f>``, from a near one.

    With P the plan that meets b, the gradient is ``a - P 1`` and the Hessian ``-S / eps``,
    ``S = diag(P 1) - P diag(1 / b) P^T``, a graph Laplacian; both are scaled by a here. Links that
    carry next to nothing leave S nearly singular, so each row has a damping (Levenberg and
    Marquardt) that bounds the steps of such modes and of no others. A plain round follows each
    step, and takes its place where the dual is better off without the step.
    An ``epsilon`` above the target's (a number or (*, 1)) is a station on the way down, passed
    less exactly.
    """
    on_the_way = epsilon is not None
    epsilon = options.epsilon if epsilon is None else epsilon
    watched = options.is_watched(kernel.x)
    rounds = _rounds(options, watched, on_the_way)
    tol = max(options.tol, _TOL_ON_THE_WAY) if on_the_way else options.tol
    back = kernel.transposed
    a, b = log_a.exp(), log_b.exp()
    root_a, root_b = a.sqrt(), b.sqrt()
    inverse_root_a = torch.where(a > 0, root_a, 1.0).reciprocal()
    # constants are the null space of S: the outer product of the null vector fills it
    null = root_a[..., :, None] * root_a[..., None, :]
    damping = torch.full_like((a * f).sum(-1, keepdim=True), _DAMPING)
    longest = torch.full_like(damping, _LONGEST)
    for k in range(rounds):
        g, share = back.softmin_and_conditional(epsilon, log_a, f)  # (*, M, N), P / b transposed
        reached = (share.transpose(-1, -2) @ b[..., None])[..., 0]
        miss = a - reached
        done = watched and not bool((miss.abs().sum(-1) > tol).any())
        if done:  # the last step squares the error, also of modes that carry less than tol
            damping = torch.full_like(damping, _LEAST_DAMPING)
        plain = following(epsilon, log_a, f, reached)
        half = share.mul_(root_b[..., None]).mul_(inverse_root_a[..., None, :])
        laplacian = (half.transpose(-1, -2) @ half).neg_().add_(null)
        diagonal = reached * inverse_root_a.square() + damping
        step = _solve(laplacian, diagonal, miss * inverse_root_a) * inverse_root_a
        step = step - (a * step).sum(-1, keepdim=True)
        candidate = f + epsilon * step.clamp(-longest, longest)
        met = back.softmin(epsilon, log_a, candidate)
        candidate = kernel.softmin(epsilon, log_b, met)
        value = (a * candidate).sum(-1) + (b * met).sum(-1)
        plain_value = (a * plain).sum(-1) + (b * g).sum(-1)
        slack = 1e-14 * (value.abs() + plain_value.abs())
        better = (value >= plain_value - slack)[..., None]
        f = torch.where(better, candidate, plain)
        damping = torch.where(better, damping / 10, damping * 10).clamp(_LEAST_DAMPING, 1e3)
        longest = torch.where(better, _GROWN * longest, _SHRUNK * longest).clamp(min=1.0)
        if done:
            return f, k + 1
    return f, rounds


def answer(
    kernel: DenseKernel, f: Tensor, log_a: Tensor, log_b: Tensor, options: SinkhornOptions,
    rounds: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the f and g that answer each other where f led, after so many rounds in all."""
    g = kernel.transposed.softmin(options.epsilon, log_a, f)
    met = kernel.softmin(options.epsilon, log_b, g)
    _check(log_a, f, met, options, kernel.x, rounds)
    return met, g


def _check(
    log_a: Tensor, f: Tensor, due: Tensor, options: SinkhornOptions, points: Tensor, rounds: int
) -> None:
    """Warn where a's marginal is missed by more than ``tol`` under f, and that is watched."""
    if options.is_watched(points):
        error = marginal_error(log_a.exp(), f, due, options.epsilon)
        if not error <= options.tol:
            warn_unconverged(error, options, rounds)


def newton_pair_annealed(
    kernel: DenseKernel, log_a: Tensor, log_b: Tensor, options: SinkhornOptions, taken: int
) -> tuple[Tensor, Tensor, int]:
    """Return the potentials f and g of ``OT_eps(a, b)`` in space and the rounds ``taken`` by then.

    Small epsilons are reached by stations of falling ones, each from where the last two point to.
    """
    watched, back = options.is_watched(kernel.x), kernel.transposed
    scaling = options.scaling ** (1 / options.p) if watched else options.scaling
    annealing = Annealing(kernel.x, kernel.y, options, scaling)
    f, behind = kernel.softmin(annealing(0), log_b, torch.zeros_like(log_b)), Behind()
    for k in range(annealing.rounds + 1):
        epsilon, target = annealing(k), k == annealing.rounds
        f = behind.foreseen(back, f, log_b, log_a, epsilon)
        f, rounds = newton_pair(kernel, f, log_a, log_b, options, None if target else epsilon)
        behind.pass_by(f, epsilon, steep=True)
        taken += rounds
    return *answer(kernel, f, log_a, log_b, options, taken), taken


def _solve(matrix: Tensor, diagonal: Tensor, right: Tensor) -> Tensor:
    """Solve ``(matrix + diag(diagonal)) u = right``; where it cannot be factored, ignore matrix."""
    jitter = 1e-12 if matrix.dtype == torch.float64 else 1e-6
    matrix.diagonal(dim1=-2, dim2=-1).add_(diagonal + jitter)
    factor, _ = torch.linalg.cholesky_ex(matrix)
    solution = torch.cholesky_solve(right[..., None], factor)[..., 0]
    return torch.where(solution.isfinite(), solution, right / diagonal)


def _rounds(options: SinkhornOptions, watched: bool, on_the_way: bool) -> int:
    if on_the_way:
        return _ROUNDS_ON_THE_WAY if watched else _UNWATCHED_ROUNDS_ON_THE_WAY
    if options.iterations is not None:
        return options.iterations
    return min(_ROUNDS, options.max_iterations) if watched else _UNWATCHED_ROUNDS
