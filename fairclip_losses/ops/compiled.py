"""The solvers in NumPy as one operator of torch, which torch.compile takes as it is."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .checks import broadcast_shapes
from .host import solve_on_host
from .options import SinkhornOptions
from .solution import Slopes

_SCHEMA = (
    "(Tensor x, Tensor y, Tensor a, Tensor b, int p, float blur, bool debias, int? iterations, "
    "float tol, int max_iterations, bool potentials) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _solve(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, p: int, blur: float, debias: bool,
    iterations: int | None, tol: float, max_iterations: int, potentials: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    options = SinkhornOptions(p, blur, debias, 0.5, iterations, tol, max_iterations)
    found = solve_on_host(x, y, a, b, options, potentials)
    slopes = [x.new_empty(0) if slope is None else slope for slope in found.slopes]
    # an operator's outputs share no memory
    return found.cost.clone(), *(slope.clone() for slope in slopes)


def _shapes(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, p: int, blur: float, debias: bool,
    iterations: int | None, tol: float, max_iterations: int, potentials: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    lead = broadcast_shapes(x.shape[:-2], y.shape[:-2], a.shape[:-1], b.shape[:-1])
    n, m = x.shape[-2], y.shape[-2]
    in_weights = [(*lead, n), (*lead, m)] if potentials else [(0,), (0,)]
    shapes = [lead, (*lead, n, 1), (*lead, m, 1), *in_weights]
    return tuple(x.new_empty(shape) for shape in shapes)


_operator = torch.library.custom_op(
    "fairclip_losses::solve_line", _solve, mutates_args=(), schema=_SCHEMA
)
_operator.register_fake(_shapes)


def solve_compiled(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, options: SinkhornOptions, potentials: bool
) -> tuple[Tensor, Slopes]:
    """Return the cost and its slopes, as `solve_on_host` does."""
    cost, *slopes = _operator(
        x, y, a, b, options.p, options.blur, options.debias, options.iterations, options.tol,
        options.max_iterations, potentials,
    )  # fmt: skip
    found = [*slopes[:2], *(slopes[2:] if potentials else (None, None))]
    return cost, cast(Slopes, tuple(found))
