r"""The exact optimal transport cost on a line (blur = 0), batched over rows of weights.

On a line the optimal coupling is the monotone one whatever the (convex) cost: a sort of the points
and a merge of the cumulative weights. Points are sorted once, however many rows of weights are put
on them, so all groups of all attributes share the sort of their batch.

* p = 1: ``W_1 = \int |A - B| dz`` over the points of both measures, A and B their distribution
  functions.
* p = 2: ``W_2^2 / 2 = 1/2 \int_0^1 (Q_a(u) - Q_b(u))^2 du`` over the merged cumulative weights, Q_a
  and Q_b the quantile functions. All terms are positive: a measure against itself costs 0 exactly.

**Ties.** Points that coincide get one slope of the Kantorovich potential: the gradient in x_i is
``a_i f'(x_i)``, in y_j ``b_j g'(y_j)``, so the order in which a sort puts them plays no part. The
slope is the mean of those that the measures' mass at the place takes: for p = 2 the mean of
``x - Q_b(u)`` over all u that belong to x; for p = 1, where ``g' = -f'``, the mean of
``-sign(A - B)`` while A - B goes from its value before the place to that behind it.

Everything after the sort runs in float64 where the device has it: cumulative weights of 1/N lose
digits in float32, and the digits lost are those in which a group differs from its batch.
Source: Peyre and Cuturi 2019 (arXiv:1803.00567), eq. 2.28-2.37.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..validation import broadcast_shapes, is_readable, refuse_second

# Cumulative weights nearer than this are the same: sums of thousands are off by tens of roundings.
SAME_WEIGHT = 64 * torch.finfo(torch.float64).eps


def working_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on the one backend that has no float64 (Apple's mps)."""
    return torch.float32 if device.type == "mps" else torch.float64


def along(values: Tensor, order: Tensor) -> Tensor:
    """Read ``values`` (*, K) at the places ``order`` (*, N), (*, N); leading dims broadcast."""
    if order.dim() == 1:
        return values.index_select(-1, order)
    if values.dim() == 1:
        return values.take(order)
    lead = broadcast_shapes(values.shape[:-1], order.shape[:-1])
    return values.expand(*lead, -1).gather(-1, order.expand(*lead, -1))


def unsort(values: Tensor, order: Tensor) -> Tensor:
    """Undo the permutation ``order`` along the last dimension."""
    if order.dim() == 1:
        return torch.empty_like(values).index_copy_(-1, order, values)
    shape = broadcast_shapes(values.shape, order.shape)
    return values.new_empty(shape).scatter_(-1, order.expand(shape), values.expand(shape))


def exact_cost(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, p: int) -> Tensor:
    """Return ``min_P sum_ij P_ij |x_i - y_j|^p / p`` for every row of weights, (*,).

    Shapes and dtypes are those of `sinkhorn_divergence` with D = 1. Gradients in all four are found
    in the backward pass, from O(N) that is kept a row.
    """
    cost: Tensor = _ExactCost.apply(x, None if y is x else y, a, b, p)
    return cost


def exact_potentials(x: Tensor, y: Tensor, a: Tensor, b: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Return Kantorovich potentials f (*, N) and g (*, M), each up to a constant of its row.

    Where cumulative weights of a and b meet they are free within an interval: these are its middle.
    """
    _, saved, _ = (_areas if p == 1 else _coupling)(x, y, a, b)
    return _potentials(p, saved, a, b, x.shape[-1], y.shape[-1])


class _ExactCost(torch.autograd.Function):
    """y None: both measures lie on x, whose gradient is then the sum of both sides'."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, a: Tensor | None, b: Tensor | None, p: int
    ) -> Tensor:
        points_x = (settled(x, a, b) if y is None else settled(x, a))[..., 0]
        points_y = None if y is None else settled(y, b)[..., 0]
        cost, saved, tied = (_areas if p == 1 else _coupling)(points_x, points_y, a, b)
        measured = has_mass(a, b)
        if measured is not None:
            cost = cost * measured
        ctx.p, ctx.tied = p, tied
        ctx.save_for_backward(x, y, a, b, measured, *saved)
        double = x.dtype == torch.float64 or (y is not None and y.dtype == torch.float64)
        return cost.to(torch.float64 if double else torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, y, a, b, measured, *saved = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * 4
        with torch.no_grad():
            if measured is not None:
                grad = grad * measured
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                by_points = _area_gradients if ctx.p == 1 else _coupling_gradients
                found = by_points(saved, a, b, grad, x.shape[-2], y is None, ctx.tied)
                for k, by in enumerate(found):  # one where y is None
                    points = (x, y)[k]
                    grads[k] = by.sum_to_size(points.shape[:-1])[..., None].to(points.dtype)
            if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
                m = (x if y is None else y).shape[-2]
                f, g = _potentials(ctx.p, saved, a, b, x.shape[-2], m)
                grads[2:] = _by_weights(a, f, grad), _by_weights(b, g, grad)
        return (*refuse_second("sinkhorn_divergence", grads, (x, y, a, b)), None)


def settled(points: Tensor, *weights: Tensor | None) -> Tensor:
    """Return points (*, N, D), those to which no row gives weight at the mean of the others.

    There, NaN or far away, they can neither overflow nor find mass that rounding leaves.
    """
    given = [rows for rows in weights if rows is not None]
    if len(given) < len(weights):
        return points
    shape = points.shape[:-1]
    used = torch.zeros((*shape, 1), dtype=torch.bool, device=points.device)
    for rows in given:  # counted in float32: a sum of booleans is none
        present = (rows > 0).to(torch.float32).expand(broadcast_shapes(shape, rows.shape))
        used = used | (present.sum_to_size(shape) > 0)[..., None]
    dtype, everything = working_dtype(points.device), list(range(len(shape)))
    total = torch.where(used, points.detach(), 0.0).sum(everything, dtype=dtype)
    return torch.where(used, points, (total / used.sum().clamp(min=1)).to(points.dtype))


def _scaled(weights: Tensor) -> Tensor:
    """Return weights of which the sum of a row cannot overflow."""
    if weights.dtype != working_dtype(weights.device):
        return weights
    largest = weights.detach().amax(-1, keepdim=True)
    return weights / torch.where(largest > 0, largest, 1.0)


def normalised(weights: Tensor | None, points: Tensor) -> Tensor:
    """Return weights whose rows sum to one, or are zeros."""
    dtype = working_dtype(points.device)
    if weights is None:
        n = points.shape[-1]
        return torch.full((n,), 1.0 / n, dtype=dtype, device=points.device)
    weights = _scaled(weights)
    total = weights.sum(-1, keepdim=True, dtype=dtype)
    return weights / total.clamp_(min=torch.finfo(dtype).tiny)


def has_mass(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return which rows have two measures, (*,); None: all."""
    given = [weights.any(-1) for weights in (a, b) if weights is not None]
    if not given or (is_readable(given[0]) and all([bool(rows.all()) for rows in given])):
        return None
    return given[0] if len(given) == 1 else given[0] & given[1]


def _may_tie(*ordered: Tensor) -> bool:
    """Whether points may coincide. Without ties a gradient takes fewer calls."""
    if not is_readable(ordered[0]):
        return True
    return not all([bool((points[..., 1:] > points[..., :-1]).all()) for points in ordered])


def _by_weights(weights: Tensor | None, potential: Tensor, grad: Tensor) -> Tensor | None:
    """Return the gradient in weights (*, N), which the cost divides by their sum."""
    if weights is None:
        return None
    centred = potential - (normalised(weights, weights) * potential).sum(-1, keepdim=True)
    total = weights.sum(-1, keepdim=True, dtype=centred.dtype)
    slopes = centred * grad[..., None] / torch.where(total > 0, total, 1.0)
    return slopes.sum_to_size(weights.shape).to(weights.dtype)


def _areas(
    x: Tensor, y: Tensor | None, a: Tensor | None, b: Tensor | None
) -> tuple[Tensor, Sequence[Tensor], bool]:
    """Return W_1 (*,), what follows for the K points of both measures, and whether any may tie:

    points in order, their order, a - b of each, and A - B before and behind each, (*, K + 1). If y
    is None they are those of x.
    """
    surplus, other = normalised(a, x), normalised(b, x if y is None else y)
    if y is None:
        points, surplus = x, surplus - other
    else:
        points, surplus = _side_by_side(x, y), _side_by_side(surplus, -other)
    points, order = points.sort(dim=-1)
    points, surplus = points.to(surplus.dtype), along(surplus, order)
    excess = pad(surplus.cumsum(-1)[..., :-1], (1, 1))
    cost = (excess[..., 1:-1].abs() * points.diff(dim=-1)).sum(-1)
    return cost, (points, order, surplus, excess), _may_tie(points)


def _side_by_side(one: Tensor, other: Tensor) -> Tensor:
    lead = broadcast_shapes(one.shape[:-1], other.shape[:-1])
    return torch.cat([one.expand(*lead, -1), other.expand(*lead, -1)], -1)


def _area_gradients(
    saved: Sequence[Tensor], a: Tensor | None, b: Tensor | None, grad: Tensor,
    n: int, common: bool, tied: bool,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients in x (and y, where not ``common``) of W_1 whose own is ``grad``."""
    points, order, surplus, excess = saved
    if tied:
        points = points.contiguous()
        before = along(excess, torch.searchsorted(points, points))
        behind = along(excess, torch.searchsorted(points, points, right=True))
        # (|before| - |behind|) / (behind - before), -sign(before) where they are the same, and 0
        # where rounding alone tells them from 0
        most = before.abs() + behind.abs()
        slopes = surplus * torch.where(most > SAME_WEIGHT, (before + behind) / most, 0.0)
        found = (slopes * -grad[..., None]).sum_to_size(points.shape)
    else:
        area = (excess.abs() * grad[..., None]).sum_to_size(*points.shape[:-1], excess.shape[-1])
        found = area[..., :-1] - area[..., 1:]
    found = unsort(found, order)
    return [found] if common else [found[..., :n], found[..., n:]]


def _coupling(
    x: Tensor, y: Tensor | None, a: Tensor | None, b: Tensor | None
) -> tuple[Tensor, Sequence[Tensor], bool]:
    """Return ``W_2^2 / 2`` (*,), what follows for its N + M - 1 steps, and whether any points tie:

    x and y in order, their orders, which y each step is at, and mass times x - y of each. Steps go
    along the merged cumulative weights; one begins where a point does, the first of both at 0.
    """
    dtype = working_dtype(x.device)
    x, order_x = x.sort(dim=-1)
    x, order_y = x.to(dtype), order_x
    if y is not None:
        y, order_y = y.sort(dim=-1)
        y = y.to(dtype)
    n = x.shape[-1]
    one, other = _between(a, order_x, dtype), _between(b, order_y, dtype)
    lead = broadcast_shapes(one.shape[:-1], other.shape[:-1])
    zero = one.new_zeros(1).expand(*lead, 1)
    begins = torch.cat([zero, one.expand(*lead, -1), other.expand(*lead, -1)], -1)
    begins, source = begins.sort(dim=-1, stable=True)
    at_y = (source >= n).cumsum(-1)
    mass = pad(begins[..., 1:], (0, 1), value=1.0) - begins
    at_x = torch.arange(at_y.shape[-1], device=x.device) - at_y
    shift = along(x, at_x) - along(x if y is None else y, at_y)
    moved = mass * shift
    cost = (moved * shift).sum(-1).mul_(0.5)
    tied = _may_tie(x) if y is None else _may_tie(x, y)
    return cost, (x, x if y is None else y, order_x, order_y, at_x, at_y, moved), tied


def _between(weights: Tensor | None, order: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the cumulative weights, of sum one, between the points in order, (*, N - 1)."""
    if weights is None:
        n = order.shape[-1]
        return torch.arange(1, n, dtype=dtype, device=order.device).div_(n)
    sums = along(_scaled(weights), order).cumsum(-1, dtype=dtype)
    return sums[..., :-1] / sums[..., -1:].clamp(min=torch.finfo(dtype).tiny)


def _coupling_gradients(
    saved: Sequence[Tensor], a: Tensor | None, b: Tensor | None, grad: Tensor,
    n: int, common: bool, tied: bool,
) -> list[Tensor]:  # fmt: skip
    """See `_area_gradients`; those of ``W_2^2 / 2``."""
    x, y, order_x, order_y, at_x, at_y, moved = saved
    moved = moved * grad[..., None]
    by_x = _gathered(moved, at_x, x, order_x, a, tied)
    by_y = _gathered(moved, at_y, y, order_y, b, tied)
    if common:
        return [unsort(by_x - by_y, order_x)]
    return [unsort(by_x, order_x), unsort(-by_y, order_y)]


def _gathered(
    moved: Tensor, at: Tensor, points: Tensor, order: Tensor, weights: Tensor | None, tied: bool
) -> Tensor:
    """Return the sum of what is ``moved`` at each point; those that coincide share by weight."""
    found = moved.new_zeros(*moved.shape[:-1], points.shape[-1])
    found.scatter_add_(-1, at.expand(moved.shape), moved)
    if tied:
        share = along(normalised(weights, points), order)
        share = share.expand(broadcast_shapes(share.shape, points.shape))
        found = found.sum_to_size(broadcast_shapes(share.shape, points.shape))
        points = points.contiguous()
        run = torch.searchsorted(points, points).expand(found.shape)
        total = torch.zeros_like(found).scatter_add_(-1, run, found)
        mass = torch.zeros_like(found).scatter_add_(-1, run, share.expand(found.shape))
        found = share * total.div_(mass.clamp_(min=torch.finfo(mass.dtype).tiny)).gather(-1, run)
    return found.sum_to_size(points.shape)


def _potentials(
    p: int, saved: Sequence[Tensor], a: Tensor | None, b: Tensor | None, n: int, m: int
) -> tuple[Tensor, Tensor]:
    """Return Kantorovich potentials f (*, N) and g (*, M), each up to a constant."""
    if p == 2:
        x, y, order_x, order_y, *_ = saved
        one, other = _between(a, order_x, x.dtype), _between(b, order_y, y.dtype)
        f, g = _potential(x, one, y, other), _potential(y, other, x, one)
        return unsort(f, order_x), unsort(g, order_y)
    # A unit of mass at a point adds to A - B in every gap behind it.
    points, order, _, excess = saved
    inner = excess[..., 1:-1]
    sign = torch.where(inner.abs() > SAME_WEIGHT, inner.sign(), 0.0)
    rise = (sign * points.diff(dim=-1)).flip(-1).cumsum(-1).flip(-1)
    f = unsort(pad(rise, (0, 1)), order)
    return f[..., :n], -f[..., -m:]


def _potential(x: Tensor, weight_x: Tensor, y: Tensor, weight_y: Tensor) -> Tensor:
    """Return f at the points x in order: f' = x - Q_b at the cumulative weights between points."""
    lead = broadcast_shapes(weight_x.shape[:-1], weight_y.shape[:-1])
    weight_y = weight_y.expand(*lead, -1).contiguous()
    partner: Tensor | float = 0.0
    for shift in (-SAME_WEIGHT, SAME_WEIGHT):
        # Absent points at the ends are no partners.
        level = (weight_x + shift).clamp(SAME_WEIGHT, 1.0 - SAME_WEIGHT).expand(*lead, -1)
        partner = partner + along(y, torch.searchsorted(weight_y, level.contiguous()))
    rise = 0.5 * x.diff(dim=-1) * (x[..., 1:] + x[..., :-1] - partner)
    return pad(rise.cumsum(-1), (1, 0))
