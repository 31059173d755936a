"""`sinkhorn_divergence`: the public entry of the Sinkhorn kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..validation import check_measure_values, refuse_second
from .exact import exact_cost
from .options import Backend, SinkhornOptions, prepare
from .solve import solve_entropic


def sinkhorn_divergence(
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
) -> Tensor:
    r"""Return the Sinkhorn divergence between batches of weighted point clouds.

    .. math::
        S_\varepsilon(a, b) = OT_\varepsilon(a, b)
            - \tfrac12 OT_\varepsilon(a, a) - \tfrac12 OT_\varepsilon(b, b), \qquad
        OT_\varepsilon(a, b) = \min_{P \in \Pi(a, b)} \langle P, C \rangle
            + \varepsilon\, KL(P \,\|\, a b^T)

    with cost ``C_ij = |x_i - y_j|^p / p`` and ``epsilon = blur^p``; ``blur`` has the unit of the
    points. ``blur=0`` is the exact optimal transport cost in the same cost, on a line only: W_1
    for ``p=1``, W_2^2 / 2 for ``p=2``. Other packages' conventions:

    ============  ======================  ==========================  ====================
    here          geomloss                POT (cost M = C)            POT (M = |x-y|^2)
    ============  ======================  ==========================  ====================
    ``blur``      ``blur``                ``reg = blur**p``           ``reg = 2 * blur**2``
    p=2 value     the same                the same                    half of POT's
    ============  ======================  ==========================  ====================

    (POT's ``ot.sinkhorn2`` regularises by the negative entropy; compare potentials and plans, or
    subtract the constant ``epsilon * (H(a) + H(b))``.)

    Args:
        x: points, (N, D) or (*, N, D), floating point.
        y: points, (M, D) or (*, M, D). Passing the same tensor as ``x`` shares its sort.
        a: weights of x, (*, N), non-negative; None is uniform. Rows are normalised to sum to one,
            so rows of different mass are fine. Weight 0: the point is absent. A row of zeros is no
            measure: its cost is 0 and its gradient zero.
        b: weights of y, (*, M), likewise. Leading dims of all four broadcast: x (N, 1) with
            b (G, M) gives (G,).
        p: 1 or 2, the power of the cost.
        blur: length scale of the regularisation, >= 0.
        debias: subtract the two self-terms, so that S(a, a) = 0 (blur > 0 only).
        scaling: factor in (0, 1) by which the length scale shrinks in eps-scaling (D > 1).
        iterations: a fixed number of iterations of the solver; for D > 1 those of eps-scaling from
            the diameter by ``scaling``, the last at the target: other packages' schedule. None:
            until the L1 error of the marginals is below ``tol``; on an accelerator, where such a
            test would wait for the device, a fixed number of its own.
        tol: see ``iterations``. For p = 2 on a line it also bounds by how much the fewer points
            that stand for all raise the marginals' L1 error.
        max_iterations: the most iterations (of Newton's method at most 200, on a line 40).
        backend: how the kernel is held when blur > 0. ``"auto"`` is right but for experiments: on a
            line Newton's method or prefix sums, in space costs in memory up to 512 x 512, above
            that tiles on the CPU and a fused kernel on a GPU. ``"dense"``: all costs in memory;
            ``"streamed"``: in tiles, O(N) memory; ``"triton"``: the fused kernel of the GPU;
            ``"prefix"``: prefix sums, p = 1 on a line.
        validate: look at the values for NaN, infinities and negative weights. None looks on the
            CPU only, since on an accelerator it waits for the device.

    Returns:
        Divergences, (*,): float64 for float64 input, else float32 (half precision is computed in
        float32 or better).

    Gradients in x, y, a and b follow the envelope theorem: they are read off the converged
    potentials (blur > 0) or the monotone coupling (blur = 0), no iteration is unrolled and O(N)
    per row is saved. A point to which no row gives weight is not looked at: the gradient in its
    weights is as if it lay at the mean. They are once differentiable: a second derivative raises
    RuntimeError.

    Raises:
        ValueError: shapes that do not fit, p not in {1, 2}, blur < 0, blur = 0 with D > 1,
            NaN or infinite points, negative or non-finite weights.

    Warns:
        ConvergenceWarning: ``max_iterations`` did not reach ``tol``, between the measures or from
            one of them to itself, where that is tested: on the CPU, without ``iterations``.

    Sources: Cuturi 2013 (arXiv:1306.0895); Feydy et al. 2019 (arXiv:1810.08278), eq. 3 for the
    divergence; Peyre and Cuturi 2019 (arXiv:1803.00567), eq. 2.28-2.30 for the line.
    """
    options = SinkhornOptions(
        p, blur, debias, scaling, iterations, tol, max_iterations, backend, validate
    )
    options.check(x, y, a, b)
    return divergence(x, y, a, b, options)


def divergence(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, options: SinkhornOptions
) -> Tensor:
    """Return what `sinkhorn_divergence` does, of tensors that have been checked."""
    if any(0 in tensor.shape for tensor in (x, y, a, b) if tensor is not None):
        return _no_measure(x, y, a, b)
    with torch.autocast(x.device.type, enabled=False):
        if options.blur == 0:
            check_measure_values(x, y, a, b, options.validate)
            return exact_cost(x, y, a, b, options.p)
        entropic = _outside_of_graphs if torch.compiler.is_compiling() else _entropic_cost
        return entropic(x, y, a, b, options)


def _entropic_cost(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, options: SinkhornOptions
) -> Tensor:
    problem = prepare(x, y, a, b, options.validate)
    inputs = problem.x, problem.y, problem.a, problem.b
    # empty parts of the inputs: what a gradient depends on, without the memory
    graphs = [entry.flatten()[:0].clone() for entry in inputs]
    cost: Tensor = _Divergence.apply(*inputs, options, *graphs)
    return problem.of_measures(cost).to(problem.result)


# torch.compile breaks its graph here: what iterates is no gain as a graph of thousands of nodes.
# `torch.compiler.disable` would import the compiler with this module.
_outside_of_graphs = torch._disable_dynamo(_entropic_cost)  # type: ignore[attr-defined]


def _no_measure(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """Return graph-connected zeros for clouds without points, or none for no rows."""
    terms = [x.sum((-1, -2)), y.sum((-1, -2))] + [w.sum(-1) for w in (a, b) if w is not None]
    zeros: Tensor = sum((0.0 * term for term in terms[1:]), 0.0 * terms[0])
    return zeros.to(torch.float64 if zeros.dtype == torch.float64 else torch.float32)


class _Divergence(torch.autograd.Function):
    """The entropic cost; its derivatives are found in forward, O(N) a row is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions,
        *graphs: Tensor,
    ) -> Tensor:  # fmt: skip
        solved, slopes = solve_entropic(x, y, a, b, options, ctx.needs_input_grad[:4])
        ctx.shapes = [entry.shape for entry in (x, y, a, b)]
        ctx.save_for_backward(*graphs, *slopes)
        return solved.cost

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        graphs, slopes = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        grads: list[Tensor | None] = [None, None, None, None]
        with torch.no_grad():
            for k, (shape, slope) in enumerate(zip(ctx.shapes, slopes, strict=True)):
                if slope is not None and ctx.needs_input_grad[k]:
                    scale = grad[..., None, None] if k < 2 else grad[..., None]
                    grads[k] = (slope * scale).sum_to_size(shape)
        return (*refuse_second("sinkhorn_divergence", grads, graphs), *[None] * 5)
