"""`sinkhorn_divergence`: the public entry of the Sinkhorn kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import broadcast_shapes, check_finite, check_weights, should_validate
from .entropic import entropic_gradients, solve_entropic
from .exact import solve_exact, working_dtype
from .options import Potentials, SinkhornOptions


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
        scaling: factor in (0, 1) by which the length scale shrinks in annealing (D > 1).
        iterations: a fixed number of rounds. None: until the L1 error of the marginals is below
            ``tol``, at most ``max_iterations`` at the final epsilon; on an accelerator, where such
            a test would wait for the device, or under torch.compile, 100 rounds.
        tol: see ``iterations``.
        max_iterations: see ``iterations``.
        validate: look at the values for NaN, infinities and negative weights. None looks on the
            CPU only, since on an accelerator it waits for the device; there absent points must be
            finite too.

    Returns:
        Divergences, (*,): float64 for float64 input, else float32 (half precision is computed in
        float32 or better).

    Gradients in x, y, a and b follow the envelope theorem: they are read off the converged
    potentials (blur > 0) or the monotone coupling (blur = 0), no iteration is unrolled and O(N)
    per row is saved. They are once differentiable: a second derivative raises RuntimeError.

    Raises:
        ValueError: shapes that do not fit, p not in {1, 2}, blur < 0, blur = 0 with D > 1,
            NaN or infinite points, negative or non-finite weights.

    Sources: Cuturi 2013 (arXiv:1306.0895); Feydy et al. 2019 (arXiv:1810.08278), eq. 3 for the
    divergence; Peyre and Cuturi 2019 (arXiv:1803.00567), eq. 2.28-2.30 for the line.
    """
    options = _check_options(p, blur, debias, scaling, iterations, tol, max_iterations)
    same_points = x is y
    _check_shapes(x, y, a, b, options)
    if should_validate(x, validate):
        check_weights(a, "a")
        check_weights(b, "b")
        x = check_finite(x, a, "x")
        y = x if same_points else check_finite(y, b, "y")

    result = torch.promote_types(x.dtype, y.dtype)
    result = result if result == torch.float64 else torch.float32
    dtype = working_dtype(x.device)
    if x.shape[-2] == 0 or y.shape[-2] == 0:
        return _no_measure(x, y, a, b).to(result)
    with torch.autocast(x.device.type, enabled=False):
        weights_a, has_a = _normalise(a, x, dtype)
        weights_b, has_b = _normalise(b, y, dtype)
        points_x, points_y = _centred(x, y, a, b, dtype)
        if blur == 0:
            other = None if same_points else points_y
            cost = _ExactCost.apply(points_x, other, weights_a, weights_b, p)
        else:
            cost = _EntropicDivergence.apply(points_x, points_y, weights_a, weights_b, options)
        assert isinstance(cost, Tensor)
        return torch.where(has_a & has_b, cost, 0.0).to(result)


def _check_options(
    p: int, blur: float, debias: bool, scaling: float,
    iterations: int | None, tol: float, max_iterations: int,
) -> SinkhornOptions:  # fmt: skip
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p!r}")
    if not 0 <= blur < math.inf:
        raise ValueError(f"blur must be a finite number >= 0, got {blur!r}")
    if not 0 < scaling < 1:
        raise ValueError(f"scaling must lie strictly between 0 and 1, got {scaling!r}")
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations must be None or >= 1, got {iterations!r}")
    if not tol > 0:
        raise ValueError(f"tol must be > 0, got {tol!r}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be >= 1, got {max_iterations!r}")
    return SinkhornOptions(p, float(blur), debias, scaling, iterations, tol, max_iterations)


def _check_shapes(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, options: SinkhornOptions
) -> None:
    for name, points in (("x", x), ("y", y)):
        if not points.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {points.dtype}")
        if points.dim() < 2:
            raise ValueError(
                f"{name} must have shape (*, N, D), got {tuple(points.shape)}; "
                f"scores (N,) on a line are {name}[:, None]"
            )
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x and y must share their dimension D, got {x.shape[-1]} and {y.shape[-1]}"
        )
    if options.blur == 0 and x.shape[-1] != 1:
        raise ValueError(
            f"blur=0 (exact transport) needs points on a line, D = 1, got D = {x.shape[-1]}; "
            "use blur > 0"
        )
    for name, weights, count in (("a", a, x.shape[-2]), ("b", b, y.shape[-2])):
        if weights is None:
            continue
        if not weights.is_floating_point():
            raise ValueError(f"weights {name} must be floating point, got {weights.dtype}")
        if weights.dim() < 1 or weights.shape[-1] != count:
            raise ValueError(
                f"weights {name} must have shape (*, {count}), got {tuple(weights.shape)}"
            )
    leads = [x.shape[:-2], y.shape[:-2]] + [w.shape[:-1] for w in (a, b) if w is not None]
    try:
        broadcast_shapes(*leads)
    except RuntimeError:
        shown = ", ".join(str(tuple(lead)) for lead in leads)
        raise ValueError(f"leading dimensions do not broadcast: {shown}") from None


def _normalise(weights: Tensor | None, points: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rows of sum one and which rows had mass; a row without becomes uniform, unused."""
    count = points.shape[-2]
    uniform = torch.full((count,), 1.0 / count, dtype=dtype, device=points.device)
    if weights is None:
        return uniform, torch.ones((), dtype=torch.bool, device=points.device)
    weights = weights.to(dtype)
    total = weights.sum(-1, keepdim=True)
    has_mass = total > 0
    normalised = torch.where(has_mass, weights / torch.where(has_mass, total, 1.0), uniform)
    return normalised, has_mass[..., 0]


def _centred(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the points about their mean, which keeps the digits that differ; absent ones are 0.

    An absent point may be NaN or far away: at the mean it can neither overflow nor spoil a sum.
    """
    there = _present(x, a)
    if y is x:
        there = there | _present(y, b)
    points = torch.where(there, x, 0.0).to(dtype)
    kept = points.detach()
    mean = kept.sum(list(range(x.dim() - 1))) / there.sum().clamp(min=1)
    centred_x = torch.where(there, points - mean, 0.0)
    if y is x:
        # A view: torch.compile refuses one tensor as two inputs of an autograd.Function.
        return centred_x, centred_x.view_as(centred_x)
    there = _present(y, b)
    return centred_x, torch.where(there, torch.where(there, y, 0.0).to(dtype) - mean, 0.0)


def _present(points: Tensor, weights: Tensor | None) -> Tensor:
    """Return which points any row gives weight, (*, N, 1)."""
    if weights is None:
        return torch.ones_like(points[..., :1], dtype=torch.bool)
    shape = points.shape[:-1]
    used = (weights > 0).to(torch.float32)
    used = used.expand(broadcast_shapes(shape, used.shape)).sum_to_size(shape)
    return (used > 0)[..., None]


def _no_measure(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """Return graph-connected zeros for clouds without points."""
    terms = [x.sum((-1, -2)), y.sum((-1, -2))] + [w.sum(-1) for w in (a, b) if w is not None]
    return sum((0.0 * term for term in terms[1:]), 0.0 * terms[0])


class _OnceDifferentiable(torch.autograd.Function):
    """Identity on a gradient that refuses to be differentiated, instead of passing as constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, source: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "sinkhorn_divergence is once differentiable: its envelope gradient has no derivative"
        )


def _refuse_second(grads: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> list[Any]:
    """Guard the gradients found under ``create_graph=True``."""
    if not torch.is_grad_enabled():
        return list(grads)
    return [
        None if grad is None else _OnceDifferentiable.apply(grad, source)
        for grad, source in zip(grads, sources, strict=True)
    ]


class _ExactCost(torch.autograd.Function):
    """Exact cost on a line; the gradients are found in forward and O(N) per row is kept.

    y None: both measures lie on x, whose gradient is then the sum of both sides'.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, a: Tensor, b: Tensor, p: int) -> Tensor:
        solution = solve_exact(
            x[..., 0], x[..., 0] if y is None else y[..., 0], a, b, p=p, same_points=y is None,
            potentials=ctx.needs_input_grad[2] or ctx.needs_input_grad[3],
        )  # fmt: skip
        grad_x, grad_y = solution.grad_x, solution.grad_y
        if y is None and grad_y is not None:
            grad_x, grad_y = grad_x + grad_y, None
        ctx.save_for_backward(x, y, a, b, grad_x, grad_y, solution.f, solution.g)
        return solution.cost.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inputs, slopes = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        grads: list[Tensor | None] = [None, None, None, None]
        with torch.no_grad():
            for k, (source, slope) in enumerate(zip(inputs, slopes, strict=True)):
                if slope is None or not ctx.needs_input_grad[k]:
                    continue
                rows = slope.to(grad.dtype) * grad[..., None]
                grads[k] = (rows[..., None] if k < 2 else rows).sum_to_size(source.shape)
        return (*_refuse_second(grads, inputs), None)


class _EntropicDivergence(torch.autograd.Function):
    """Entropic divergence; backward reads the gradients off the saved potentials."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions
    ) -> Tensor:
        cost, potentials = solve_entropic(x, y, a, b, options)
        ctx.save_for_backward(x, y, a, b, *potentials)
        ctx.options = options
        return cost

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, y, a, b, *saved = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            grads = entropic_gradients(
                grad, x, y, a, b, Potentials(*saved), ctx.options, ctx.needs_input_grad
            )
        return (*_refuse_second(grads, (x, y, a, b)), None)
