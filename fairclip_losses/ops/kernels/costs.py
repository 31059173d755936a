"""Costs between points in memory, and what they are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import is_readable

# Largest D for which costs come from differences, not from products: those lose half of the digits
# of the distance of points much nearer to each other than to the mean.
DIFFERENCES = 8
# Reaches over the distance of points that are near each other, as most in a plan are.
_NEAR = 10.0
# The matrix product of oneDNN, of float32 only, where torch was built with it. On AMD's processors
# it takes half of the time of MKL's.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
    _ONEDNN = None


def costs(x: Tensor, y: Tensor, p: int, *, rough: bool = False) -> Tensor:
    """Return ``|x_i - y_j|^p / p`` of x (*, N, D) and y (*, M, D), (*, N, M).

    Rough ones may be as far off where points meet as `worst_rounding` says.
    """
    if x.shape[-1] <= DIFFERENCES:
        square = squares_of_differences(x, y)
        return square.mul_(0.5) if p == 2 else square.sqrt_()
    if p == 1:
        mode = "use_mm_for_euclid_dist" if rough else "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(x, y, compute_mode=mode)
        if rough and x is y:
            distance.diagonal(dim1=-2, dim2=-1).zero_()
        return distance
    norms = [0.5 * points.square().sum(-1) for points in (x, y)]
    cost = inner_products(x, y).neg_()
    return cost.add_(norms[0][..., :, None]).add_(norms[1][..., None, :]).clamp_(min=0.0)


def squares_of_differences(x: Tensor, y: Tensor) -> Tensor:
    """Return ``|x_i - y_j|^2``, (*, N, M), to the last digits of the differences; for few D."""
    square: Tensor | None = None
    for k in range(x.shape[-1]):
        apart = x[..., :, k, None] - y[..., None, :, k]
        square = apart.square_() if square is None else square.addcmul_(apart, apart)
    assert square is not None  # a point has a coordinate
    return square


def uses_onednn(x: Tensor) -> bool:
    """Whether `inner_products` of x (N, D) are oneDNN's, which choose their memory themselves."""
    return _ONEDNN is not None and x.dtype == torch.float32 and x.dim() == 2 and is_readable(x)


def inner_products(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``x_i . y_j``, (*, N, M)."""
    if out is None and y.dim() == 2 and uses_onednn(x):
        assert _ONEDNN is not None
        products: Tensor = _ONEDNN(x, y, None, "none", [], "")
        return products
    return torch.matmul(x, y.transpose(-1, -2), out=out)


def rounding(x: Tensor, y: Tensor, p: int, dtype: torch.dtype) -> float:
    """Return a bound on the error of the costs in ``dtype``, in their unit; reads back.

    Distances that come from products lose more where points nearly meet; see `worst_rounding`.
    """
    reach = max(float(points.square().sum(-1).max()) for points in (x, y))
    lost = 2.0 * reach if p == 2 else 2.0 * reach**0.5
    return lost * torch.finfo(dtype).eps * (_NEAR if _from_products(x, p) else 1.0)


def worst_rounding(x: Tensor, y: Tensor, p: int, dtype: torch.dtype) -> float:
    """Return `rounding` at points that meet."""
    worse = torch.finfo(dtype).eps ** -0.5 / _NEAR if _from_products(x, p) else 1.0
    return rounding(x, y, p, dtype) * worse


def _from_products(x: Tensor, p: int) -> bool:
    """Whether distances are roots of what is left of products."""
    return p == 1 and x.shape[-1] > DIFFERENCES
