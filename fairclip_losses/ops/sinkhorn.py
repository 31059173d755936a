"""`sinkhorn_divergence`: the public entry of the Sinkhorn kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import refuse_second
from .compiled import solve_compiled
from .entropic import solve_entropic
from .exact import exact_cost
from .host import suits_host_solver
from .options import Backend, SinkhornOptions
from .prepare import check_options, check_shapes, check_values, prepare


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
        scaling: factor in (0, 1) by which the length scale shrinks in annealing (D > 1); Newton's
            method shrinks epsilon by it where it watches its convergence.
        iterations: a fixed number of rounds of the solver; for D > 1 those of the annealing from
            the diameter by ``scaling``, the last at the target: other packages' schedule. None:
            until the L1 error of the marginals is below ``tol``, at most ``max_iterations`` at the
            target (and at most 200 of Newton's, 40 of those in NumPy, 100 of prefix sums); on an
            accelerator, where such a test would wait for the device, a fixed number of its own.
        tol: see ``iterations``. Newton's last step goes far below it, and for D > 1 rounds go on
            while what they still change is not far below it. For p = 2 on a line it also
            bounds by how much the fewer points that stand for all raise the marginals' L1 error.
        max_iterations: see ``iterations``.
        backend: what holds the kernel when blur > 0. ``"dense"``: all costs; accelerated alternate
            updates, and up to 512 points (1,024 on a line) Newton's method: after 100 of them, at
            once where nobody may look at the convergence, and on a line. ``"streamed"``: costs a
            block at a time and alternate updates; ``"triton"``: a fused kernel of the GPU, for any
            D; ``"prefix"``: prefix sums, O(N) a round, for p = 1 on a line. ``"auto"``: on the CPU,
            on a line,
            Newton's method in NumPy (one operator under torch.compile). For p = 1 at O(N) a round
            (that is also ``"prefix"`` there; but more than 64 rows of at most 96 points of their
            own are dense); for p = 2 at O(N) once and then the cost of the points that stand for
            all, about ``5 * diameter / blur`` at most, each with those that it is coupled with.
            Elsewhere, on a line, dense as far as Newton's method goes and all rows have at most
            2^21 costs (p = 1) or 2^23 (p = 2), or each 96^2 or 512^2; above, prefix sums for p = 1.
            Else, on a GPU,
            triton, where the package is there; without it dense up to 512 x 512 costs (D > 1) and
            streamed above.
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
        ConvergenceWarning: ``max_iterations`` rounds did not reach ``tol``, between the measures or
            from one of them to itself, where that is watched.

    Sources: Cuturi 2013 (arXiv:1306.0895); Feydy et al. 2019 (arXiv:1810.08278), eq. 3 for the
    divergence; Peyre and Cuturi 2019 (arXiv:1803.00567), eq. 2.28-2.30 for the line.
    """
    options = check_options(
        p, blur, debias, scaling, iterations, tol, max_iterations, backend, validate
    )
    check_shapes(x, y, a, b, options)
    if any(0 in tensor.shape for tensor in (x, y, a, b) if tensor is not None):
        return _no_measure(x, y, a, b)
    with torch.autocast(x.device.type, enabled=False):
        if options.blur == 0:
            x, y = check_values(x, y, a, b, validate)
            return exact_cost(x, y, a, b, options.p)
        problem = prepare(x, y, a, b, validate)
        cost = _Divergence.apply(
            problem.x, problem.y, problem.a, problem.b, options, problem.result == torch.float32,
            *(_graph_of(entry) for entry in (problem.x, problem.y, problem.a, problem.b)),
        )  # fmt: skip
        assert isinstance(cost, Tensor)
        return problem.of_measures(cost).to(problem.result)


def _no_measure(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """Return graph-connected zeros for clouds without points, or none for no rows."""
    terms = [x.sum((-1, -2)), y.sum((-1, -2))] + [w.sum(-1) for w in (a, b) if w is not None]
    zeros: Tensor = sum((0.0 * term for term in terms[1:]), 0.0 * terms[0])
    return zeros.to(torch.float64 if zeros.dtype == torch.float64 else torch.float32)


def _graph_of(entry: Tensor | None) -> Tensor | None:
    """Return an empty part of an input: what a gradient depends on, without the memory."""
    return None if entry is None else entry.flatten()[:0].clone()


class _Divergence(torch.autograd.Function):
    """The entropic cost; its derivatives are found in forward, O(N) a row is kept.

    y None: both measures lie on x, whose gradient is then the sum of both sides'.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, a: Tensor, b: Tensor, options: SinkhornOptions,
        single: bool, *graphs: Tensor | None,
    ) -> Tensor:  # fmt: skip
        wants_x, wants_y, *wants_weights = ctx.needs_input_grad[:4]
        wanted = (wants_x, wants_x if y is None else wants_y, *wants_weights)
        other = x if y is None else y
        if torch.compiler.is_compiling() and suits_host_solver(x, other, options):
            cost, found = solve_compiled(x, other, a, b, options, any(wants_weights))
            slopes = [s if want else None for s, want in zip(found, wanted, strict=True)]
        else:
            entropic = solve_entropic(x, other, a, b, options, wanted, single)
            cost, slopes = entropic.cost, list(entropic.slopes)
        if y is None and slopes[0] is not None and slopes[1] is not None:
            slopes[:2] = [slopes[0] + slopes[1], None]
        ctx.shapes = [None if entry is None else entry.shape for entry in (x, y, a, b)]
        ctx.save_for_backward(*graphs, *slopes)
        return cost.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        graphs, slopes = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        grads: list[Tensor | None] = [None, None, None, None]
        with torch.no_grad():
            for k, (shape, slope) in enumerate(zip(ctx.shapes, slopes, strict=True)):
                if slope is None or not ctx.needs_input_grad[k]:
                    continue
                scale = grad[..., None, None] if k < 2 else grad[..., None]
                grads[k] = (slope.to(grad.dtype) * scale).sum_to_size(shape)
        return (*refuse_second(grads, graphs), *[None] * 6)
