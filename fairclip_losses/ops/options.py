"""What a solver is asked for, what a kernel offers it, and how the inputs are prepared."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from ..validation import (
    check_choice,
    check_cost,
    check_integer,
    check_measure_values,
    check_measures,
    is_number,
    is_readable,
)
from .exact import has_mass, normalised, settled, working_dtype

Backend = Literal["auto", "dense", "streamed", "triton", "prefix"]
_BACKENDS: tuple[str, ...] = get_args(Backend)  # here, where torch.compile need not follow


class ConvergenceWarning(UserWarning):
    """The Sinkhorn solver stopped before it converged."""


@dataclass(frozen=True)
class SinkhornOptions:
    """What `sinkhorn_divergence` was asked for; see its docstring.

    Raises:
        ValueError: options out of range, or that do not go together.
    """

    p: int = 2
    blur: float = 0.05
    debias: bool = True
    scaling: float = 0.5
    iterations: int | None = None
    tol: float = 1e-6
    max_iterations: int = 1000
    backend: Backend = "auto"
    validate: bool | None = None

    def __post_init__(self) -> None:
        """Check the options, once."""
        check_cost(self.p, self.blur)
        if not isinstance(self.debias, bool):
            raise ValueError(f"debias must be True or False, got {self.debias!r}")
        if self.validate is not None and not isinstance(self.validate, bool):
            raise ValueError(f"validate must be None, True or False, got {self.validate!r}")
        if not (is_number(self.scaling) and 0 < self.scaling < 1):
            raise ValueError(f"scaling must lie strictly between 0 and 1, got {self.scaling!r}")
        if self.iterations is not None:
            check_integer("iterations", self.iterations, 1)
        if not (is_number(self.tol) and self.tol > 0):
            raise ValueError(f"tol must be > 0, got {self.tol!r}")
        check_integer("max_iterations", self.max_iterations, 1)
        check_choice("backend", self.backend, _BACKENDS)
        if self.backend == "prefix" and self.p != 1:
            raise ValueError(f"backend 'prefix' is for p = 1, got p = {self.p}")

    @property
    def epsilon(self) -> float:
        """Strength of the entropy, in the unit of the cost."""
        return float(self.blur) ** self.p

    def is_watched(self, points: Tensor) -> bool:
        """Whether convergence is tested and ends the iterations."""
        return self.iterations is None and is_readable(points)

    def check(self, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> None:
        """Refuse tensors that do not make a problem together, or not one for these options."""
        check_measures(x, y, a, b)
        dimension = x.shape[-1]
        if self.blur == 0 and dimension != 1:
            raise ValueError(
                f"blur=0 (exact transport) needs points on a line, D = 1, got D = {dimension}; "
                "use blur > 0"
            )
        if self.backend == "prefix" and dimension != 1:
            raise ValueError(f"backend 'prefix' needs points on a line, D = 1, got D = {dimension}")
        if self.backend == "triton" and not runs_triton(x):
            raise ValueError(
                "backend 'triton' needs the package triton, 3.2 or later, and points on a CUDA "
                f"device, got points on {x.device}"
            )


class Kernel(Protocol):
    """The Gibbs kernel ``exp(-C_ij / eps)`` between x (*, N, D) and y (*, M, D).

    Two operators are enough for every solver. ``epsilon`` is a number or a 0-dim tensor, ``log_b``
    (*, M) are the logs of weights, ``g`` (*, M) is a potential on y.
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

        A kernel that finds both in one pass may leave g as it is where b is 0.
        """
        f = self.softmin(epsilon, log_b, g)
        return f, self.transposed.softmin(epsilon, log_a, f)

    def gradient(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """``sum_j P(j | i) grad_x c(x_i, y_j)``, (*, N, D): in each point, per unit of mass."""

    def lead_in(self, epsilon: float) -> tuple[Kernel, float] | None:
        """A quicker kernel for iterations that only lead on, and the marginal error it gets to."""
        return None


class Prepared(NamedTuple):
    """A problem in the working precision."""

    x: Tensor  # (*, N, D)
    y: Tensor  # (*, M, D), x itself where both are one tensor
    a: Tensor  # (*, N)
    b: Tensor  # (*, M)
    has_mass: Tensor | None  # (*,) whether both measures have any; None: all have
    result: torch.dtype

    def of_measures(self, costs: Tensor) -> Tensor:
        """Return the costs (*,), 0 where there is no measure."""
        return costs if self.has_mass is None else torch.where(self.has_mass, costs, 0.0)


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


def warn_unconverged(error: float | None, options: SinkhornOptions, iterations: int) -> None:
    """Say so where the solver stopped before the marginals were met to ``tol``; NaN is not met.

    Not where nobody tested (None), or where the number of iterations was given.
    """
    if error is None or options.iterations is not None or error <= options.tol:
        return
    warnings.warn(
        f"the Sinkhorn solver stopped after {iterations} iterations with an L1 error of the "
        f"marginals of {error:.1e}, above tol = {options.tol:.1e}, at blur = {options.blur:g}: "
        "take a larger blur, or raise max_iterations or tol",
        ConvergenceWarning,
        stacklevel=2,
    )


def prepare(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, validate: bool | None
) -> Prepared:
    """Check the values where asked for, centre the points and normalise the weights.

    Points lie about their mean, which keeps the digits that differ. A row without mass is uniform.
    """
    check_measure_values(x, y, a, b, validate)
    result = torch.promote_types(x.dtype, y.dtype)
    weights_a, weights_b = (
        torch.where(rows.any(-1, keepdim=True), rows, 1.0 / rows.shape[-1])
        for rows in (normalised(a, x[..., 0]), normalised(b, y[..., 0]))
    )
    settled_x = settled(x, a, b) if x is y else settled(x, a)
    everything = list(range(x.dim() - 1))
    mean = settled_x.detach().mean(everything, dtype=working_dtype(x.device))
    centred = settled_x - mean
    return Prepared(
        centred,
        centred if x is y else settled(y, b) - mean,
        weights_a,
        weights_b,
        has_mass(a, b),
        result if result == torch.float64 else torch.float32,
    )
