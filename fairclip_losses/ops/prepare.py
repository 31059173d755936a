"""From what was passed in to a problem that the solvers take: checked, centred, rows of sum one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from .checks import (
    broadcast_shapes,
    check_finite,
    check_weights,
    runs_triton,
    should_validate,
)
from .exact import working_dtype
from .options import Backend, SinkhornOptions

# Read off once: torch.compile need not follow typing's functions.
_BACKENDS: tuple[str, ...] = get_args(Backend)


class Prepared(NamedTuple):
    """A problem in the working precision."""

    x: Tensor  # (*, N, D)
    y: Tensor | None  # (*, M, D), None: the same tensor as x
    a: Tensor  # (*, N)
    b: Tensor  # (*, M)
    has_mass: Tensor | None  # (*,) whether both measures have any; None: all have
    result: torch.dtype

    def of_measures(self, costs: Tensor) -> Tensor:
        """Return the costs (*,), 0 where there is no measure."""
        return costs if self.has_mass is None else torch.where(self.has_mass, costs, 0.0)


def prepare(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, validate: bool | None
) -> Prepared:
    """Check the values where asked for, centre the points and normalise the weights."""
    same_points = x is y
    x, y = check_values(x, y, a, b, validate)
    result = torch.promote_types(x.dtype, y.dtype)
    dtype = working_dtype(x.device)
    weights_a, has_a = _normalise(a, x, dtype)
    weights_b, has_b = _normalise(b, y, dtype)
    points_x, points_y = _centred(x, y, a, b, dtype)
    return Prepared(
        points_x, None if same_points else points_y, weights_a, weights_b, _both(has_a, has_b),
        result if result == torch.float64 else torch.float32,
    )  # fmt: skip


def check_values(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, validate: bool | None
) -> tuple[Tensor, Tensor]:
    """Refuse points and weights that are no numbers, where asked for; return absent points as 0."""
    if not should_validate(x, validate):
        return x, y
    check_weights(a, "a")
    check_weights(b, "b")
    same_points = x is y
    x = check_finite(x, [a, b] if same_points else [a], "x")
    return x, x if same_points else check_finite(y, [b], "y")


def check_options(
    p: int, blur: float, debias: bool, scaling: float, iterations: int | None, tol: float,
    max_iterations: int, backend: Backend, validate: bool | None,
) -> SinkhornOptions:  # fmt: skip
    """Return the options as one value, or say which of them is wrong."""
    if not isinstance(debias, bool):
        raise ValueError(f"debias must be True or False, got {debias!r}")
    if validate is not None and not isinstance(validate, bool):
        raise ValueError(f"validate must be None, True or False, got {validate!r}")
    try:
        return _checked(p, blur, debias, scaling, iterations, tol, max_iterations, backend)
    except TypeError:  # what is no number
        numbers = {"p": p, "blur": blur, "scaling": scaling, "tol": tol}
        counts = {"iterations": iterations, "max_iterations": max_iterations}
        shown = ", ".join(f"{name}={value!r}" for name, value in (numbers | counts).items())
        raise ValueError(f"the options of the divergence must be numbers, got {shown}") from None


def _checked(
    p: int, blur: float, debias: bool, scaling: float,
    iterations: int | None, tol: float, max_iterations: int, backend: Backend,
) -> SinkhornOptions:  # fmt: skip
    check_cost(p, blur)
    if not 0 < scaling < 1:
        raise ValueError(f"scaling must lie strictly between 0 and 1, got {scaling!r}")
    if iterations is not None and not _is_count(iterations):
        raise ValueError(f"iterations must be None or an integer >= 1, got {iterations!r}")
    if isinstance(tol, bool) or not tol > 0:
        raise ValueError(f"tol must be > 0, got {tol!r}")
    if not _is_count(max_iterations):
        raise ValueError(f"max_iterations must be an integer >= 1, got {max_iterations!r}")
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {_BACKENDS}, got {backend!r}")
    if backend == "prefix" and p != 1:
        raise ValueError(f"backend 'prefix' is for p = 1, got p = {p}")
    return SinkhornOptions(
        int(p), float(blur), debias, scaling, iterations, tol, max_iterations, backend
    )


def check_cost(p: int, blur: float) -> None:
    """Refuse a power or a blur that the divergence does not have."""
    if isinstance(p, bool) or p not in (1, 2):  # True is 1
        raise ValueError(f"p must be 1 or 2, got {p!r}")
    if isinstance(blur, bool) or not 0 <= blur < math.inf:
        raise ValueError(f"blur must be a finite number >= 0, got {blur!r}")
    if blur != 0 and not 1e-100 <= float(blur) <= 1e100:  # blur^p must be a number too
        raise ValueError(f"blur must be 0 or from 1e-100 to 1e100, got {blur!r}")


def _is_count(value: int) -> bool:
    """Whether it counts rounds for `range`: 2.0 does not, and True is meant otherwise."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 1


def check_shapes(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, options: SinkhornOptions
) -> None:
    """Refuse tensors of dtypes and shapes that do not make a problem together."""
    _check_points(x, "x")
    if y is not x:
        _check_points(y, "y")
    *lead_x, n, dimension = x.shape
    *lead_y, m, other = y.shape
    if dimension != other:
        raise ValueError(f"x and y must share their dimension D, got {dimension} and {other}")
    if options.blur == 0 and dimension != 1:
        raise ValueError(
            f"blur=0 (exact transport) needs points on a line, D = 1, got D = {dimension}; "
            "use blur > 0"
        )
    if options.backend == "prefix" and dimension != 1:
        raise ValueError(f"backend 'prefix' needs points on a line, D = 1, got D = {dimension}")
    if options.backend == "triton" and not runs_triton(x):
        raise ValueError(
            "backend 'triton' needs the package triton, 3.2 or later, and points on a CUDA device, "
            f"got points on {x.device}"
        )
    leads = [lead_x, lead_y, _check_weights(a, "a", n), _check_weights(b, "b", m)]
    try:
        broadcast_shapes(*leads)
    except RuntimeError:
        shown = ", ".join(str(tuple(lead)) for lead in leads)
        raise ValueError(f"leading dimensions do not broadcast: {shown}") from None


def _check_points(points: Tensor, name: str) -> None:
    if not isinstance(points, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(points).__name__}")
    if not points.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {points.dtype}")
    if points.dim() < 2:
        raise ValueError(
            f"{name} must have shape (*, N, D), got {tuple(points.shape)}; "
            f"scores (N,) on a line are {name}[:, None]"
        )


def _check_weights(weights: Tensor | None, name: str, count: int) -> Sequence[int]:
    """Return the leading dimensions."""
    if weights is None:
        return ()
    if not weights.is_floating_point():
        raise ValueError(f"weights {name} must be floating point, got {weights.dtype}")
    if weights.dim() < 1 or weights.shape[-1] != count:
        raise ValueError(f"weights {name} must have shape (*, {count}), got {tuple(weights.shape)}")
    return weights.shape[:-1]


def _normalise(
    weights: Tensor | None, points: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return rows of sum one and which rows had mass; a row without becomes uniform, unused."""
    count = points.shape[-2]
    if weights is None:
        return torch.full((count,), 1.0 / count, dtype=dtype, device=points.device), None
    if weights.dtype == dtype:  # else their sum cannot overflow
        largest = weights.detach().amax(-1, keepdim=True)
        weights = weights / torch.where(largest > 0, largest, 1.0)
    weights = weights.to(dtype)
    total = weights.sum(-1, keepdim=True)
    has_mass = total > 0
    empty = ~has_mass
    return (weights + empty) / torch.add(total, empty, alpha=count), has_mass[..., 0]


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one & other


def _centred(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the points about their mean, which keeps the digits that differ; absent ones are 0.

    An absent point may be NaN or far away: at the mean it can neither overflow nor spoil a sum.
    """
    there = _present(x, a)
    if y is x and there is not None:
        also = _present(y, b)
        there = None if also is None else there | also
    points = x if there is None else torch.where(there, x, 0.0)
    count = points[..., 0].numel() if there is None else there.sum().clamp(min=1)
    mean = points.detach().sum(list(range(x.dim() - 1)), dtype=dtype) / count
    centred = points - mean  # in the mean's dtype, without a copy of the points in it
    centred_x = centred if there is None else torch.where(there, centred, 0.0)
    if y is x:
        return centred_x, centred_x
    there = _present(y, b)
    if there is None:
        return centred_x, y - mean
    return centred_x, torch.where(there, torch.where(there, y, 0.0).to(dtype) - mean, 0.0)


def _present(points: Tensor, weights: Tensor | None) -> Tensor | None:
    """Return which points any row gives weight, (*, N, 1); None is all of them."""
    if weights is None:
        return None
    shape = points.shape[:-1]
    used = (weights > 0).to(torch.float32)
    used = used.expand(broadcast_shapes(shape, used.shape)).sum_to_size(shape)
    return (used > 0)[..., None]
