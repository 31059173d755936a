"""What a solver is asked for, what a kernel offers it, and how the inputs are prepared."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from ..validation import all_at_least, is_number, should_validate

Backend = Literal["auto", "dense", "streamed", "triton", "prefix"]
# Read once: torch.compile need not follow typing's functions.
_BACKENDS: tuple[str, ...] = get_args(Backend)


class ConvergenceWarning(UserWarning):
    """The Sinkhorn solver stopped before it converged."""


@dataclass(frozen=True)
class SinkhornOptions:
    """What `sinkhorn_divergence` was asked for; see its docstring."""

    p: int
    blur: float
    debias: bool
    scaling: float
    iterations: int | None
    tol: float
    max_iterations: int
    backend: Backend = "auto"

    @property
    def epsilon(self) -> float:
        """Strength of the entropy, in the unit of the cost."""
        return self.blur**self.p

    @staticmethod
    def can_read(points: Tensor) -> bool:
        """Whether reading a number back waits for no device."""
        return points.device.type == "cpu"

    def is_watched(self, points: Tensor) -> bool:
        """Whether convergence is tested and ends the iterations."""
        return self.iterations is None and self.can_read(points)


class Kernel(Protocol):
    """The Gibbs kernel ``exp(-C_ij / eps)`` between x (*, N, D) and y (*, M, D).

    Two operators are enough for every solver; how the costs are held, the kernel knows. ``epsilon``
    is a number or a 0-dim tensor; ``log_b`` (*, M) are the logs of weights, ``g`` (*, M) is a
    potential on y.
    """

    x: Tensor
    y: Tensor

    @property
    def transposed(self) -> Kernel:
        """The kernel from y to x."""

    def softmin(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """The c-transform ``f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps)``, (*, N)."""

    def update(
        self, epsilon: Tensor | float, log_a: Tensor, log_b: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One Sinkhorn iteration: ``f = softmin(g)`` and the c-transform of f, (*, M).

        Of both in one pass, where the kernel can; it may leave g as it is where b is 0.
        """

    def gradient(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """``sum_j P(j | i) grad_x c(x_i, y_j)``, (*, N, D): in each point, per unit of mass."""


Slopes = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class EntropicSolution(NamedTuple):
    """A solved divergence; all of it is in the working precision and carries no gradient."""

    cost: Tensor  # (*,) the divergence
    slopes: Slopes  # its derivatives a row in x, y, a and b; None where not wanted
    transport_cost: Tensor  # (*,) OT_eps(a, b)
    f: Tensor  # (*, N) potentials between a and b
    g: Tensor  # (*, M)
    f_self: Tensor | None  # (*, N) potential of OT_eps(a, a), None without debiasing
    g_self: Tensor | None  # (*, M)
    iterations: int  # taken between a and b


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


def is_readable(points: Tensor) -> bool:
    """Whether reading a number back waits for no device and breaks no graph of torch.compile."""
    return points.device.type == "cpu" and not torch.compiler.is_compiling()


def working_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on the one backend that has no float64 (Apple's mps)."""
    return torch.float32 if device.type == "mps" else torch.float64


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """Return the shape that all broadcast to, in a tenth of the time of torch's; RuntimeError."""
    longer = [shape for shape in shapes if shape]
    if len(longer) < 2:
        return torch.Size(*longer)
    sizes = [1] * max([len(shape) for shape in longer])
    for shape in longer:
        for k, size in enumerate(shape, len(sizes) - len(shape)):
            if size != 1 and sizes[k] not in (1, size):
                raise RuntimeError(f"shapes do not broadcast: {shapes}")
            sizes[k] = sizes[k] if size == 1 else size
    return torch.Size(sizes)


@cache
def _has_triton() -> bool:
    """Whether there is a Triton of 3.2 or later: before, constants in float64 are float32's."""
    if find_spec("triton") is None:
        return False
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (3, 2)


def runs_triton(points: Tensor) -> bool:
    """Whether Triton's kernels run where the points are: on a GPU, or in Triton's interpreter."""
    here = points.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return here and _has_triton()


def warn_unconverged(error: float, options: SinkhornOptions, iterations: int) -> None:
    """Say that the solver stopped before the marginals were met to ``tol``."""
    warnings.warn(
        f"the Sinkhorn solver stopped after {iterations} iterations with an L1 error of the "
        f"marginals of {error:.1e}, above tol = {options.tol:.1e}, at blur = {options.blur:g}: "
        "take a larger blur, or raise max_iterations or tol",
        ConvergenceWarning,
        stacklevel=2,
    )


def check_options(
    p: int, blur: float, debias: bool, scaling: float, iterations: int | None, tol: float,
    max_iterations: int, backend: Backend, validate: bool | None,
) -> SinkhornOptions:  # fmt: skip
    """Return the options as one value, or say which of them is wrong."""
    check_cost(p, blur)
    if not isinstance(debias, bool):
        raise ValueError(f"debias must be True or False, got {debias!r}")
    if validate is not None and not isinstance(validate, bool):
        raise ValueError(f"validate must be None, True or False, got {validate!r}")
    if not (is_number(scaling) and 0 < scaling < 1):
        raise ValueError(f"scaling must lie strictly between 0 and 1, got {scaling!r}")
    if iterations is not None and not _is_count(iterations):
        raise ValueError(f"iterations must be None or an integer >= 1, got {iterations!r}")
    if not (is_number(tol) and tol > 0):
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
    if not is_number(p) or p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p!r}")
    if not is_number(blur) or not 0 <= blur < math.inf:
        raise ValueError(f"blur must be a finite number >= 0, got {blur!r}")
    if blur != 0 and not 1e-100 <= float(blur) <= 1e100:  # blur^p must be a number too
        raise ValueError(f"blur must be 0 or from 1e-100 to 1e100, got {blur!r}")


def _is_count(value: object) -> bool:
    """Whether it is an integer for `range`: 2.0 is not."""
    return is_number(value) and hasattr(value, "__index__") and int(value) >= 1


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
    points_x, points_y = _centre(x, y, a, b, dtype)
    has_mass = has_b if has_a is None else has_a if has_b is None else has_a & has_b
    return Prepared(
        points_x, None if same_points else points_y, weights_a, weights_b, has_mass,
        result if result == torch.float64 else torch.float32,
    )  # fmt: skip


def check_values(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, validate: bool | None
) -> tuple[Tensor, Tensor]:
    """Refuse points and weights that are no numbers, where asked for; return absent points as 0."""
    if not should_validate(x, validate):
        return x, y
    _refuse_bad_weights(a, "a")
    _refuse_bad_weights(b, "b")
    same_points = x is y
    x = _refuse_bad_points(x, [a, b] if same_points else [a], "x")
    return x, x if same_points else _refuse_bad_points(y, [b], "y")


def _refuse_bad_weights(weights: Tensor | None, name: str) -> None:
    if weights is None or all_at_least(weights, 0.0):
        return
    bad = ~(torch.isfinite(weights) & (weights >= 0))
    if bool(bad.any()):
        raise ValueError(
            f"weights {name} must be finite and >= 0, got {float(weights[bad][0])} "
            f"({int(bad.sum())} such of {weights.numel()})"
        )


def _refuse_bad_points(points: Tensor, weights: Sequence[Tensor | None], name: str) -> Tensor:
    """Refuse NaN and infinite points that a row of any weights uses; return the absent as 0."""
    if math.isfinite(points.detach().sum()):  # one pass; an overflow is looked at again
        return points
    bad = ~torch.isfinite(points).all(-1)
    used = torch.zeros_like(bad)
    for some in weights:
        used = used | (bad if some is None else bad & (some > 0))
    if bool(used.any()):
        raise ValueError(
            f"{name} must be finite where it has weight, got NaN or infinity at "
            f"{int(used.sum())} of {used.numel()} points"
        )
    return torch.where(bad[..., None], 0.0, points)


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


def _centre(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the points about their mean, which keeps the digits that differ; absent ones are 0.

    An absent point may be NaN or far away: at the mean it can neither overflow nor spoil a sum.
    """
    present = _present(x, a)
    if y is x and present is not None:
        also = _present(y, b)
        present = None if also is None else present | also
    points = x if present is None else torch.where(present, x, 0.0)
    count = points[..., 0].numel() if present is None else present.sum().clamp(min=1)
    mean = points.detach().sum(list(range(x.dim() - 1)), dtype=dtype) / count
    centred = points - mean  # in the mean's dtype, without a copy of the points in it
    centred_x = centred if present is None else torch.where(present, centred, 0.0)
    if y is x:
        return centred_x, centred_x
    present = _present(y, b)
    if present is None:
        return centred_x, y - mean
    return centred_x, torch.where(present, torch.where(present, y, 0.0).to(dtype) - mean, 0.0)


def _present(points: Tensor, weights: Tensor | None) -> Tensor | None:
    """Return which points any row gives weight, (*, N, 1); None is all of them."""
    if weights is None:
        return None
    shape = points.shape[:-1]
    used = (weights > 0).to(torch.float32)
    used = used.expand(broadcast_shapes(shape, used.shape)).sum_to_size(shape)
    return (used > 0)[..., None]


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


def refuse_second(grads: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> list[Any]:
    """Guard the gradients found under ``create_graph=True``."""
    if not torch.is_grad_enabled():
        return list(grads)
    return [
        None if grad is None else _OnceDifferentiable.apply(grad, source)
        for grad, source in zip(grads, sources, strict=True)
    ]
