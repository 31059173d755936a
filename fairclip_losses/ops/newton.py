"""Newton's method on the dual, for problems whose plan fits in memory.

Alternate updates contract by 1 - O(eps) a round, so thousands of rounds lie between a small blur
and gradients that are right; the semi-dual is smooth and concave, and Newton needs about eight.
A round costs one exponential per pair of points, one matrix product and one Cholesky factor, of
which none waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dense import DenseKernel
from .options import SinkhornOptions

# Longest change of a potential in one round, in units of epsilon: far from the optimum the
# quadratic model of an exponential holds no further.
_TRUST = 5.0
# Most points on the smaller side of a problem that Newton is used for.
MAX_POINTS = 1024
_ROUNDS = 40
# Rounds where nothing may be read back from the device, so that no test can end them.
_UNWATCHED_ROUNDS = 12


def fits_newton(kernel: DenseKernel) -> bool:
    """Whether the plan is small enough to be factored."""
    n, m = kernel.x.shape[-2], kernel.y.shape[-2]
    return min(n, m) <= MAX_POINTS and n * m <= MAX_POINTS**2


def newton_pair(
    kernel: DenseKernel, f: Tensor, log_a: Tensor, log_b: Tensor, options: SinkhornOptions
) -> Tensor:
    """Return the f that maximises the semi-dual ``<a, f> + <b, softmin f>``, from a near one.

    With P the plan that meets b, the gradient is ``a - P 1`` and the Hessian ``-S / eps``,
    ``S = diag(P 1) - P diag(1 / b) P^T``, a graph Laplacian; both are scaled by a here.
    """
    epsilon = options.epsilon
    back = kernel.transposed
    a, b = log_a.exp(), log_b.exp()
    root_a = a.sqrt()
    inverse_root_a = torch.where(a > 0, root_a, 1.0).reciprocal()
    root_b = b.sqrt()

    def newton_step(f: Tensor) -> tuple[Tensor, Tensor]:
        share = back.conditional(epsilon, log_a, f)  # (*, M, N), P / b transposed
        reached = (share.transpose(-1, -2) @ b[..., None])[..., 0]
        miss = a - reached
        half = share * root_b[..., None] * inverse_root_a[..., None, :]
        # constants are its null space: the outer product of the null vector fills it
        laplacian = root_a[..., :, None] * root_a[..., None, :] - half.transpose(-1, -2) @ half
        diagonal = (reached * inverse_root_a.square()).clamp(min=1e-3)
        step = _solve(laplacian, diagonal, miss * inverse_root_a) * inverse_root_a
        return step, miss.abs().sum(-1)

    return _iterate(newton_step, f, options, kernel.x)


def newton_self(
    kernel: DenseKernel, f: Tensor, log_a: Tensor, options: SinkhornOptions
) -> Tensor:
    """Return the potential of ``OT_eps(a, a)``, from a near one.

    The symmetric plan has marginal ``a exp((f - softmin f) / eps)``; with the conditional plan Q,
    Newton's equation on its logarithm is ``(1 + Q) step = (softmin f - f) / eps``.
    """
    epsilon = options.epsilon
    a = log_a.exp()
    root_a = a.sqrt()
    inverse_root_a = torch.where(a > 0, root_a, 1.0).reciprocal()

    def newton_step(f: Tensor) -> tuple[Tensor, Tensor]:
        exponent = kernel.softmin(epsilon, log_a, f)
        share = kernel.conditional(epsilon, log_a, f)
        excess = (exponent - f) / epsilon
        # Q is similar to a positive matrix once both sides of the plan are scaled alike
        tilt = (0.5 * excess).exp()
        scale = root_a * tilt
        ...
        return excess, excess

    return _iterate(newton_step, f, options, kernel.x)
