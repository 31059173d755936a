"""`sinkhorn_solve`: the divergence with what the solver knows of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .options import Backend, SinkhornOptions, prepare
from .solve import Solution, entropic_marginal_error, solve_entropic


@dataclass(frozen=True)
class SinkhornResult(Solution):
    """A solved Sinkhorn divergence with what proves it; nothing in it carries a gradient.

    Potentials belong to ``OT_eps(a, b)``: ``OT_eps = <a, f> + <b, g>`` and the optimal plan is
    ``a_i b_j exp((f_i + g_j - C_ij) / epsilon)``. They are defined up to a constant.
    """

    marginal_error: Tensor  # (*,) L1 distance of the plan's marginals from a and b
    converged: Tensor  # (*,) bool, marginal_error and those of the self-terms <= tol


def sinkhorn_solve(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    p: int = 2,
    blur: float = 0.05,
    debias: bool = True,
    scaling: float = 0.5,
    iterations: int | None = None,
    tol: float = 1e-6,
    max_iterations: int = 1000,
    backend: Backend = "auto",
    validate: bool | None = None,
) -> SinkhornResult:
    """Return the divergence of `sinkhorn_divergence` with potentials and a proof of convergence.

    Arguments, shapes and errors are those of `sinkhorn_divergence`, blur > 0. All is computed and
    returned in the working precision (float64 but on mps). Rows without mass cost 0; their
    potentials are those of uniform weights and mean nothing.

    ``marginal_error`` is measured on all points, also where fewer stood for them in the solution.
    It does not fall below the rounding of the potentials, some ``1e-16 (diameter / blur)^p``. It
    may also stay above ``tol`` where clusters lie many blurs apart and their masses agree to less
    than that: then hardly any coupling ties their potentials to each other, and neither the cost
    nor its gradient in the points depends on that.

    Raises:
        ValueError: as `sinkhorn_divergence`; blur = 0; no points.
    """
    options = SinkhornOptions(
        p, blur, debias, scaling, iterations, tol, max_iterations, backend, validate
    )
    options.check(x, y, a, b)
    if options.blur == 0:
        raise ValueError("sinkhorn_solve needs blur > 0; use sinkhorn_divergence for blur = 0")
    if any(0 in tensor.shape for tensor in (x, y, a, b) if tensor is not None):
        raise ValueError(
            f"sinkhorn_solve needs points and rows, got x {tuple(x.shape)} and y {tuple(y.shape)}"
        )
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        problem = prepare(x, y, a, b, validate)
        x, y, a, b = problem.x, problem.y, problem.a, problem.b
        solved, _ = solve_entropic(x, y, a, b, options, [False, False, True, True])
        error = entropic_marginal_error(x, y, a, b, solved.f, solved.g, options)
        converged = error <= options.tol
        for points, weights, own in ((x, a, solved.f_self), (y, b, solved.g_self)):
            if own is not None:  # both marginals of a measure's plan with itself are the same
                twice = entropic_marginal_error(points, points, weights, weights, own, own, options)
                converged = converged & (0.5 * twice <= options.tol)
        costs = {
            name: problem.of_measures(getattr(solved, name)) for name in ("cost", "transport_cost")
        }
        return SinkhornResult(**vars(solved) | costs, marginal_error=error, converged=converged)
