"""The dense reference: textbook Sinkhorn for one pair of measures, to be checked by eye.

Nothing in the package calls it in training; the tests hold every other path against it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cost_matrix(x: Tensor, y: Tensor, p: int) -> Tensor:
    """Return ``|x_i - y_j|^p / p``, shape (N, M), for points x (N, D) and y (M, D)."""
    distance: Tensor = torch.linalg.vector_norm(x[:, None, :] - y[None, :, :], dim=-1)
    return distance.pow(p) / p


def entropic_cost(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, p: int, blur: float, iterations: int
) -> Tensor:
    """Return ``OT_eps(a, b)``, eps = blur^p, by ``iterations`` of log-domain Sinkhorn.

    ``OT_eps = min_P <P, C> + eps KL(P | a b^T)`` over the couplings P of a and b. Its dual is
    ``max <a, f> + <b, g>`` once either marginal holds, which is the value returned.
    The weights a (N,) and b (M,) are positive and sum to one.
    """
    epsilon = blur**p
    cost = cost_matrix(x, y, p)
    f = torch.zeros_like(a)
    g = torch.zeros_like(b)
    for _ in range(iterations):
        f = -epsilon * torch.logsumexp(b.log() + (g - cost) / epsilon, dim=1)
        g = -epsilon * torch.logsumexp(a.log()[:, None] + (f[:, None] - cost) / epsilon, dim=0)
    return a @ f + b @ g


def sinkhorn_divergence_reference(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    p: int = 2,
    blur: float = 0.05,
    debias: bool = True,
    iterations: int = 1000,
) -> Tensor:
    """Return ``OT_eps(a, b) - OT_eps(a, a) / 2 - OT_eps(b, b) / 2`` of one pair of measures.

    Shapes: x (N, D), y (M, D), a (N,), b (M,) with positive entries; the result is a scalar.
    Autograd unrolls the iterations here, so its gradients are an oracle for the envelope theorem.
    """
    a, b = a / a.sum(), b / b.sum()

    def entropic(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return entropic_cost(x, y, a, b, p=p, blur=blur, iterations=iterations)

    value = entropic(x, y, a, b)
    if debias:
        value = value - entropic(x, x, a, a) / 2 - entropic(y, y, b, b) / 2
    return value
