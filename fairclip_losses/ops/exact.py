"""The exact optimal transport cost on a line (blur = 0), batched over rows of weights.

On a line the optimal coupling is the monotone one whatever the (convex) cost, so the whole problem
is a sort of the points and a merge of the two cumulative weights. Points are sorted once, however
many rows of weights are put on them: all groups of all attributes share the sort of their batch.

Everything after the sort runs in float64 where the device has it: cumulative weights of 1/N lose
digits in float32, and the digits lost are those in which a group differs from its batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .options import broadcast_shapes, working_dtype

# Cumulative weights nearer to each other are the same: in units of the last place of 1.
_LEVEL = 64


class ExactSolution(NamedTuple):
    """Costs, their gradients in the points, and Kantorovich potentials, in the callers' order."""

    cost: Tensor  # (*,)
    grad_x: Tensor  # (*, N)
    grad_y: Tensor | None  # (*, M); None where x and y are one tensor and grad_x holds the sum
    f: Tensor | None  # (*, N), d cost / d a
    g: Tensor | None  # (*, M), d cost / d b


def solve_exact(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, p: int, same_points: bool, potentials: bool
) -> ExactSolution:
    """Solve ``min_P sum_ij P_ij |x_i - y_j|^p / p`` for every row of weights.

    x (*, N) and y (*, M) are points, a (*, N) and b (*, M) weights whose rows sum to one; leading
    dimensions broadcast. ``same_points`` says that y is x; ``potentials`` asks for f and g too.
    """
    line = _in_order(x, y, a, b, same_points)
    if p == 1 and same_points:
        solution = _solve_by_distribution_functions(line.x, line.a, line.b, potentials)
    else:
        walk = _Walk(line, ties=potentials)
        cost, grad_x, grad_y = walk.cost_and_slopes(p, same_points)
        f, g = walk.potentials(p) if potentials else (None, None)
        solution = ExactSolution(cost, grad_x, grad_y, f, g)
    return ExactSolution(
        solution.cost,
        unsort(solution.grad_x, line.order_x),
        None if solution.grad_y is None else unsort(solution.grad_y, line.order_y),
        None if solution.f is None else unsort(solution.f, line.order_x),
        None if solution.g is None else unsort(solution.g, line.order_y),
    )


def exact_potentials(x: Tensor, y: Tensor, a: Tensor, b: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Return f and g of `solve_exact` alone, for points that are not common."""
    line = _in_order(x, y, a, b, False)
    f, g = _Walk(line, ties=True).potentials(p)
    return unsort(f, line.order_x), unsort(g, line.order_y)


class _Line(NamedTuple):
    """Points and weights in order, and the orders that put them so."""

    x: Tensor  # (*, N)
    y: Tensor  # (*, M)
    a: Tensor  # (*, N)
    b: Tensor  # (*, M)
    order_x: Tensor
    order_y: Tensor


def _in_order(x: Tensor, y: Tensor, a: Tensor, b: Tensor, same_points: bool) -> _Line:
    dtype = working_dtype(x.device)
    x_sorted, x_order = x.to(dtype).sort(dim=-1)
    a_sorted = along(a.to(dtype), x_order)
    if same_points:
        y_sorted, y_order = x_sorted, x_order
    else:
        y_sorted, y_order = y.to(dtype).sort(dim=-1)
    return _Line(x_sorted, y_sorted, a_sorted, along(b.to(dtype), y_order), x_order, y_order)


def along(values: Tensor, order: Tensor) -> Tensor:
    """Read ``values`` (*, K) at the places ``order`` (*, N), (*, N); leading dims broadcast."""
    if order.dim() == 1:
        return values.index_select(-1, order)
    lead = broadcast_shapes(values.shape[:-1], order.shape[:-1])
    return values.expand(*lead, -1).gather(-1, order.expand(*lead, -1))


def unsort(values: Tensor, order: Tensor) -> Tensor:
    """Undo the permutation ``order`` along the last dimension."""
    if order.dim() == 1:
        return torch.empty_like(values).index_copy_(-1, order, values)
    shape = broadcast_shapes(values.shape, order.shape)
    return values.new_empty(shape).scatter_(-1, order.expand(shape), values.expand(shape))


def _solve_by_distribution_functions(
    z: Tensor, a: Tensor, b: Tensor, potentials: bool
) -> ExactSolution:
    """p = 1 on common points: ``W_1 = integral |A - B|``, A and B the cumulative weights.

    Points that coincide get one slope of the potential, times their own share of ``a - b``: the
    order in which the sort put them plays no part, so a collapsed batch is not torn apart.
    """
    surplus = a - b
    levels = torch.nn.functional.pad(surplus.cumsum(-1)[..., :-1], (1, 1))  # A - B at the gaps
    gap = z.diff(dim=-1)
    excess = levels[..., 1:-1]
    cost = (excess.abs() * gap).sum(-1)
    runs = _Runs(z)
    left, right = along(levels, runs.first), along(levels, runs.after)
    # (|left| - |right|) / (right - left), -sign(left) where they are the same, and 0 where rounding
    # alone tells them from 0
    total = (left.abs() + right.abs()).clamp_(min=_LEVEL * torch.finfo(z.dtype).eps)
    grad = surplus * (left + right).neg_().div_(total)
    if not potentials:
        return ExactSolution(cost, grad, None, None, None)
    slope = excess.sign() * gap
    # d W_1 / d a_i: what one more unit of mass at i adds to every gap on its right
    f = torch.nn.functional.pad(slope.flip(-1).cumsum(-1).flip(-1), (0, 1))
    return ExactSolution(cost, grad, None, f, -f)


class _Walk:
    """Any p: equal quantiles are coupled, along the merged cumulative weights from 0 to 1.

    The merge has N + M steps; step k carries the mass ``du_k`` from point i(k) to point j(k) and
    ends at the level k, of which level 0 is 0. With ``ties`` rounding does not decide what is one:
    potentials, but nothing else, depend on that.
    """

    def __init__(self, line: _Line, *, ties: bool) -> None:
        x, y, a, b, *_ = line
        n, m = a.shape[-1], b.shape[-1]
        lead = broadcast_shapes(x.shape[:-1], y.shape[:-1], a.shape[:-1], b.shape[:-1])
        steps = torch.arange(n + m + 1, device=x.device)
        upper_a, upper_b = _upper_levels(a).expand(*lead, n), _upper_levels(b).expand(*lead, m)
        upper_a, upper_b = upper_a.contiguous(), upper_b.contiguous()
        # place of each point's upper level in the merge; at ties a's level comes first
        merged_a = upper_a - _LEVEL * torch.finfo(upper_a.dtype).eps if ties else upper_a
        place_a = torch.searchsorted(upper_b, merged_a, right=False).add_(steps[1 : n + 1])
        place_b = torch.searchsorted(merged_a, upper_b, right=True).add_(steps[1 : m + 1])
        from_a = place_a.new_zeros(*lead, n + m + 1).scatter_(-1, place_a, 1)
        passed_a = from_a.cumsum(-1)[..., :-1]  # before the step
        self._at_b = (steps[:-1] - passed_a).clamp_(max=m - 1)
        self._at_a = passed_a.clamp_(max=n - 1)
        self._x, self._y = x.expand(*lead, n), y.expand(*lead, m)
        self._shift = self._x.gather(-1, self._at_a) - self._y.gather(-1, self._at_b)
        self._line, self._ties = line, ties
        self._upper_a, self._upper_b, self._place_a, self._place_b = (
            upper_a, upper_b, place_a, place_b,
        )  # fmt: skip

    def cost_and_slopes(self, p: int, same_points: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the cost (*,) and its slopes in x and y; of common points the sum and None."""
        levels = self._shift.new_zeros(*self._shift.shape[:-1], self._shift.shape[-1] + 1)
        levels.scatter_(-1, self._place_a, self._upper_a)
        levels.scatter_(-1, self._place_b, self._upper_b)
        mass = levels.diff(dim=-1)
        if self._ties:
            mass = mass.clamp_(min=0.0)  # of ties in the other order
        cost = (mass * _ground_cost(self._shift, p)).sum(-1)
        pull = mass * (self._shift.sign() if p == 1 else self._shift)
        total = torch.nn.functional.pad(pull.cumsum(-1), (1, 0))
        runs_x = _Runs(self._line.x)
        runs_y = runs_x if same_points else _Runs(self._line.y)
        pulled_a, pulled_b = total.gather(-1, self._place_a), total.gather(-1, self._place_b)
        grad_x = runs_x.share_out(pulled_a, self._upper_a, self._line.a)
        grad_y = runs_y.share_out(pulled_b, self._upper_b, self._line.b).neg_()
        return (cost, grad_x + grad_y, None) if same_points else (cost, grad_x, grad_y)

    def potentials(self, p: int) -> tuple[Tensor, Tensor]:
        """Return Kantorovich potentials, by complementary slackness along the walk.

        ``f_i(k) + g_j(k) = c(x_i(k), y_j(k))``: where the walk leaves i, f changes by what the cost
        changes against the point of b that it stands on.
        """
        ends_a, ends_b = self._place_a - 1, self._place_b - 1  # the last step of each point
        anchor = self._y.gather(-1, self._at_b.gather(-1, ends_a)[..., :-1])
        change = _ground_cost(self._x[..., 1:] - anchor, p)
        change = change - _ground_cost(self._x[..., :-1] - anchor, p)
        f = torch.nn.functional.pad(change.cumsum(-1), (1, 0))
        reached = f.gather(-1, self._at_a.gather(-1, ends_b))
        return f, _ground_cost(self._shift.gather(-1, ends_b), p) - reached


def _upper_levels(weights: Tensor) -> Tensor:
    """Return the cumulative weights, ending at 1 exactly, which leaves no mass uncoupled."""
    levels = weights.cumsum(-1)
    return levels / levels[..., -1:]


class _Runs:
    """The runs of coinciding points on a line, the same for each of a run's points."""

    def __init__(self, ordered: Tensor) -> None:
        ladder = ordered.contiguous()
        self.first = torch.searchsorted(ladder, ladder)  # how many points lie before the run
        self.after = torch.searchsorted(ladder, ladder, right=True)  # and up to its end

    def share_out(self, pulled: Tensor, levels: Tensor, weights: Tensor) -> Tensor:
        """Return the pull of each point, (*, n), from the cumulative pulls and weights.

        Within a run it is shared out by weight: a sort may not tell which points go where.
        """
        sums = torch.nn.functional.pad(torch.stack([pulled, levels]), (1, 0))
        pull, mass = along(sums, self.after) - along(sums, self.first)
        share: Tensor = weights / mass.clamp_(min=torch.finfo(mass.dtype).tiny)
        return share.mul_(pull)


def _ground_cost(shift: Tensor, p: int) -> Tensor:
    return shift.abs() if p == 1 else 0.5 * shift.square()
