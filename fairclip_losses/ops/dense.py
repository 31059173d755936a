"""The Gibbs kernel with all costs in memory, and Newton's method on the dual for such kernels.

Alternating updates contract by 1 - O(eps), so thousands of iterations lie between a small blur and
gradients that are right; the semi-dual is smooth and concave, and Newton needs about eight, up to
sixteen where groups are small or clusters hardly couple. An iteration costs one exponential per
pair of points, one matrix product and one Cholesky factor, of which none waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .options import Kernel, SinkhornOptions, warn_unconverged
from .sinkhorn_loop import Potentials, epsilon_schedule, marginal_error

# Largest D for which squared distances come from differences, not from products: those lose half
# of the digits of the distance of points much nearer to each other than to the mean.
MAX_DIMENSION_OF_DIFFERENCES = 8
# Longest change of one entry of a potential in the first step, in units of epsilon, and the factors
# by which it grows with a step that helps and shrinks with one that does not.
_MAX_STEP_EPS, _STEP_GROWTH, _STEP_CUT = 5.0, 2.0, 0.5
# The Levenberg-Marquardt damping of modes that hardly any coupling carries: first, least and most.
_DAMPING, _MIN_DAMPING, _MAX_DAMPING = 1e-3, 1e-12, 1e3
# Most points on the smaller side whose Cholesky factor is worth it, in space and on a line, where
# nothing else is as sure.
_MAX_POINTS, _MAX_POINTS_ON_A_LINE = 512, 1024
# Most iterations at the target, and at an epsilon above it, where a marginal error of `_STAGE_TOL`
# will do; and how many where nothing may be read back from the device.
_ITERATIONS, _STAGE_ITERATIONS, _STAGE_TOL = 200, 60, 1e-3
_FIXED_ITERATIONS, _FIXED_STAGE_ITERATIONS = 16, 4


def costs(x: Tensor, y: Tensor, p: int) -> Tensor:
    """Return ``|x_i - y_j|^p / p`` of x (*, N, D) and y (*, M, D), (*, N, M)."""
    if x.shape[-1] <= MAX_DIMENSION_OF_DIFFERENCES:
        square = (x[..., :, 0, None] - y[..., None, :, 0]).square_()
        for k in range(1, x.shape[-1]):
            difference = x[..., :, k, None] - y[..., None, :, k]
            square.addcmul_(difference, difference)
        return square.mul_(0.5) if p == 2 else square.sqrt_()
    if p == 1:
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    half_x, half_y = (0.5 * points.square().sum(-1) for points in (x, y))
    products = x @ y.transpose(-1, -2)
    return products.neg_().add_(half_x[..., :, None]).add_(half_y[..., None, :]).clamp_(min=0.0)


class DenseKernel(Kernel):
    """See `Kernel`; all N x M costs are in memory."""

    def __init__(self, x: Tensor, y: Tensor, p: int, cost: Tensor | None = None) -> None:
        self.x, self.y, self.p = x, y, p
        self.cost = costs(x, y, p) if cost is None else cost

    @property
    def transposed(self) -> DenseKernel:
        """The kernel from y to x, sharing the costs."""
        return DenseKernel(self.y, self.x, self.p, self.cost.transpose(-1, -2))

    def softmin_and_coupling(
        self, epsilon: Tensor | float, log_b: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the softmin (*, N) and ``P(j | i)``, (*, N, M): where the mass of x_i goes."""
        exponent = (log_b + g / epsilon)[..., None, :] - self.cost / epsilon
        largest = exponent.amax(-1, keepdim=True)
        weight = exponent.sub_(largest).exp_()
        total = weight.sum(-1, keepdim=True)
        return -epsilon * (largest + total.log())[..., 0], weight.div_(total)

    def softmin(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `Kernel.softmin`."""
        exponent = (log_b + g / epsilon)[..., None, :] - self.cost / epsilon
        return -epsilon * exponent.logsumexp(-1)

    def gradient(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `Kernel.gradient`."""
        _, coupling = self.softmin_and_coupling(epsilon, log_b, g)
        if self.p == 1:  # unit vectors, and 0 where the points meet
            coupling = torch.where(self.cost > 0, coupling / self.cost, 0.0)
            return coupling.sum(-1, keepdim=True) * self.x - coupling @ self.y
        return self.x - coupling @ self.y


def fits_newton(x: Tensor, y: Tensor) -> bool:
    """Whether the coupling between x (*, N, D) and y (*, M, D) is small enough to be factored."""
    n, m = x.shape[-2], y.shape[-2]
    most = _MAX_POINTS_ON_A_LINE if x.shape[-1] == 1 else _MAX_POINTS
    return min(n, m) <= most and n * m <= most**2


def newton(
    kernel: DenseKernel, log_a: Tensor, log_b: Tensor, options: SinkhornOptions, g: Tensor | None,
    taken: int = 0,
) -> Potentials:  # fmt: skip
    """Solve ``OT_eps(a, b)`` from a near g, or by eps-scaling; ``taken`` iterations came before."""
    watched = options.is_watched(kernel.x)
    stages: list[Tensor | float] = [options.epsilon]
    if g is None:
        scaling = options.scaling ** (1 / options.p) if watched else options.scaling
        stages, g = epsilon_schedule(kernel.x, kernel.y, options, scaling), torch.zeros_like(log_b)
    f = kernel.softmin(stages[0], log_b, g)
    for left, epsilon in zip(range(len(stages))[::-1], stages, strict=True):
        f, iterations = _newton_at(kernel, f, log_a, log_b, options, epsilon, not left)
        taken += iterations
    g = kernel.transposed.softmin(options.epsilon, log_a, f)
    met = kernel.softmin(options.epsilon, log_b, g)
    error = None
    if watched:
        error = float(marginal_error(log_a.exp(), f, met, options.epsilon).max())
        warn_unconverged(error, options, taken)
    return Potentials(met, g, taken, error)


def _newton_at(
    kernel: DenseKernel, f: Tensor, log_a: Tensor, log_b: Tensor, options: SinkhornOptions,
    epsilon: Tensor | float, at_target: bool,
) -> tuple[Tensor, int]:  # fmt: skip
    """Return the f that maximises the semi-dual ``<a, f> + <b, softmin f>``, from a near one.

    With P the coupling that meets b, the gradient is ``a - P 1`` and the Hessian ``-S / eps``,
    ``S = diag(P 1) - P diag(1 / b) P^T``; both are scaled by a here. The damping bounds the steps
    of modes that hardly any coupling carries. A plain update follows each step, and takes its place
    where the dual value is higher without the step.
    """
    watched = options.is_watched(kernel.x)
    if at_target:
        tol, most = options.tol, min(_ITERATIONS, options.max_iterations)
        most = options.iterations or (most if watched else _FIXED_ITERATIONS)
    else:
        tol = max(options.tol, _STAGE_TOL)
        most = _STAGE_ITERATIONS if watched else _FIXED_STAGE_ITERATIONS
    back, a, b = kernel.transposed, log_a.exp(), log_b.exp()
    damping = torch.full_like((a * f).sum(-1, keepdim=True), _DAMPING)
    longest = torch.full_like(damping, _MAX_STEP_EPS)
    for k in range(most):  # noqa: B007
        g, coupling = back.softmin_and_coupling(epsilon, log_a, f)  # (*, M, N), P / b transposed
        mass = (coupling.transpose(-1, -2) @ b[..., None])[..., 0]
        done = watched and not bool(((a - mass).abs().sum(-1) > tol).any())
        if done:  # the last step squares the error, also of modes that carry less than tol
            damping = torch.full_like(damping, _MIN_DAMPING)
        # A mass that underflows raises the potential by some 700 epsilon at most.
        log_mass = mass.clamp(min=torch.finfo(mass.dtype).tiny).log()
        plain = torch.where(a > 0, f - epsilon * (log_mass - log_a), f)
        step = _newton_step(coupling, a, b, mass, damping)
        candidate = f + epsilon * step.clamp(-longest, longest)
        met = back.softmin(epsilon, log_a, candidate)
        candidate = kernel.softmin(epsilon, log_b, met)
        value = (a * candidate).sum(-1) + (b * met).sum(-1)
        plain_value = (a * plain).sum(-1) + (b * g).sum(-1)
        slack = 1e-14 * (value.abs() + plain_value.abs())
        better = (value >= plain_value - slack)[..., None]
        f = torch.where(better, candidate, plain)
        damping = torch.where(better, damping / 10, damping * 10).clamp(_MIN_DAMPING, _MAX_DAMPING)
        longest = torch.where(better, _STEP_GROWTH * longest, _STEP_CUT * longest).clamp(min=1.0)
        if done:
            break
    return f, k + 1


def _newton_step(coupling: Tensor, a: Tensor, b: Tensor, mass: Tensor, damping: Tensor) -> Tensor:
    """Return the step in units of epsilon (*, N); ``coupling`` (*, M, N) is overwritten."""
    root_a, root_b = a.sqrt(), b.sqrt()
    inverse_root_a = torch.where(a > 0, root_a, 1.0).reciprocal()
    half = coupling.mul_(root_b[..., None]).mul_(inverse_root_a[..., None, :])
    # constants are the null space of S: the outer product of the null vector fills it
    null = root_a[..., :, None] * root_a[..., None, :]
    matrix = (half.transpose(-1, -2) @ half).neg_().add_(null)
    diagonal = mass * inverse_root_a.square() + damping
    right = (a - mass) * inverse_root_a
    jitter = 1e-12 if matrix.dtype == torch.float64 else 1e-6
    matrix.diagonal(dim1=-2, dim2=-1).add_(diagonal + jitter)
    factor, _ = torch.linalg.cholesky_ex(matrix)
    step = torch.cholesky_solve(right[..., None], factor)[..., 0]
    # where it cannot be factored, the diagonal alone
    step = torch.where(step.isfinite(), step, right / diagonal) * inverse_root_a
    return step - (a * step).sum(-1, keepdim=True)
