"""p = 1 on a line by prefix sums, and updates on a line that a diffusion accelerates.

To the left of x the kernel is ``exp(y / eps) exp(-x / eps)``, to the right the reverse, so sums of
it over sorted points are running sums: an update is O(N). They run in the log domain: exact at any
blur, with an error of the potentials near ``rounding * diameter``, not ``rounding * diameter /
eps``.

An update moves an error of the potential as a step of a random walk does: from x to where the
coupling sends it, and back. Over lengths far above one step that takes 1 / eps updates; there the
walk is a diffusion, which two running sums invert. So each update adds the diffusion's step for the
mass still in the wrong place: 10 to 40 iterations do, at any blur.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..validation import broadcast_shapes
from .exact import along, unsort
from .options import Kernel, SinkhornOptions, warn_unconverged
from .sinkhorn_loop import Potentials, marginal_error

# Most iterations, and how many where nothing may be read back from the device.
_ITERATIONS, _FIXED_ITERATIONS = 100, 80
# The diffusion is measured anew in so many first iterations, and in one of so many later.
_MEASURED_FIRST, _MEASURED_EVERY = 3, 3
# Part of the diffusion's step that is taken: all of it overshoots at the length of one update.
_STEP_FRACTION = 0.7
# Longest change by it, in units of epsilon, between neighbouring points and in all: beyond that the
# linear model of an update is wrong.
_MAX_DIFFERENCE_EPS, _MAX_STEP_EPS = 3.0, 5.0


class LaplaceLine(Kernel):
    """See `Kernel`; ``exp(-|x_i - y_j| / eps)`` between x (*, N, 1) and y (*, M, 1).

    Both directions are summed at once, in the second to last place of tensors (*, 2, M): the sums
    from the left, and those from the right along the reversed line.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        sorted_y, order = y[..., 0].sort(dim=-1)
        lead = broadcast_shapes(x.shape[:-2], y.shape[:-2])
        points = x[..., 0].expand(*lead, -1).contiguous()
        line = sorted_y.expand(*lead, -1).contiguous()
        below = torch.searchsorted(line, points)  # how many y < x_i
        up_to = torch.searchsorted(line, points, right=True)  # how many y <= x_i
        above = y.shape[-2] - up_to
        self._order = torch.stack([order, order.flip(-1)], -2)
        self._heights = torch.stack([sorted_y, -sorted_y.flip(-1)], -2)
        self._shifts = torch.stack([-points, points], -2)
        self._all, self._apart = torch.stack([up_to, above], -2), torch.stack([below, above], -2)
        self._scaled: tuple[Tensor | float, Tensor, Tensor] | None = None

    @cached_property
    def transposed(self) -> LaplaceLine:
        """The kernel from y to x."""
        other = LaplaceLine(self.y, self.x)
        other.transposed = self
        return other

    def softmin(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `Kernel.softmin`."""
        left, right = self._read(self._running_sums(epsilon, log_b, g), self._all)
        return -epsilon * torch.logaddexp(left, right)

    def gradient(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """See `Kernel.gradient`."""
        sums = self._running_sums(epsilon, log_b, g)
        total = torch.logaddexp(*self._read(sums, self._all))
        left, right = self._read(sums, self._apart)
        return ((left - total).exp_() - (right - total).exp_())[..., None]

    def _running_sums(self, epsilon: Tensor | float, log_b: Tensor, g: Tensor) -> Tensor:
        """Return the logarithms of the running sums, (*, 2, M + 1), the first of no points."""
        if self._scaled is None or self._scaled[0] is not epsilon:
            self._scaled = epsilon, self._heights / epsilon, self._shifts / epsilon
        exponent = torch.add(log_b, g, alpha=1.0 / float(epsilon))  # a number on a line
        ordered = along(exponent[..., None, :], self._order) + self._scaled[1]
        return torch.nn.functional.pad(ordered.logcumsumexp(-1), (1, 0), value=-torch.inf)

    def _read(self, sums: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Read the sums at as many points from either end, moved to where x is, (*, N) each."""
        assert self._scaled is not None
        left, right = (along(sums, places) + self._scaled[2]).unbind(-2)
        return left, right


def diffusion_loop(
    kernel: Kernel, log_a: Tensor, log_b: Tensor, options: SinkhornOptions, g: Tensor
) -> Potentials:
    """Solve ``OT_eps(a, b)`` on a line, from a near g."""
    epsilon, back = options.epsilon, kernel.transposed
    watched, a, b = options.is_watched(kernel.x), log_a.exp(), log_b.exp()
    f = kernel.softmin(epsilon, log_b, g)
    plain, value = f, torch.full_like((a * f).sum(-1), -torch.inf)
    fraction = torch.full_like(value, _STEP_FRACTION)[..., None]
    diffusion, error = _Diffusion(kernel.x[..., 0], a), None
    most = options.iterations or (
        min(_ITERATIONS, options.max_iterations) if watched else _FIXED_ITERATIONS
    )
    for k in range(most):
        g = back.softmin(epsilon, log_a, f)
        f_next = kernel.softmin(epsilon, log_b, g)
        if watched:
            error = float(marginal_error(a, f, f_next, epsilon).max())
            if error <= options.tol:
                f = f_next
                break
        if k < _MEASURED_FIRST or k % _MEASURED_EVERY == 0:
            diffusion.measure(kernel, f, g, log_a, log_b, epsilon)
        step = fraction * diffusion.step(torch.expm1((f - f_next) / epsilon) * -a)
        reached = (a * f).sum(-1) + (b * g).sum(-1)
        # a plain update never lowers the dual value: where the diffusion did, take it back
        better = (reached >= torch.sub(value, reached.abs(), alpha=1e-12))[..., None]
        f = torch.where(better, torch.add(f_next, step, alpha=epsilon), plain)
        plain = torch.where(better, f_next, plain)
        fraction = torch.where(better, (1.2 * fraction).clamp(max=_STEP_FRACTION), 0.5 * fraction)
        value = torch.maximum(value, reached)
    warn_unconverged(error, options, k + 1)
    return Potentials(f, back.softmin(epsilon, log_a, f), k + 1, error)


class _Diffusion:
    """The points of a measure in order, and how fast mass diffuses between neighbours."""

    def __init__(self, points: Tensor, weights: Tensor) -> None:
        ordered, self._order = points.sort(-1)
        self._points, self._gaps, self._weights = points, ordered.diff(dim=-1), weights
        self._conductance = self._gaps

    def measure(
        self, kernel: Kernel, f: Tensor, g: Tensor, log_a: Tensor, log_b: Tensor, epsilon: float
    ) -> None:
        """Find the conductance of the gaps, (*, N - 1), the sum of ``W_ij (x_j - x_i)`` across one.

        W_ij is the mass that an update moves: from gap to gap that grows by mass times mean move.
        """
        home = _average(kernel.transposed, epsilon, log_a, f, self._points)  # E[x' | y]
        move = _average(kernel, epsilon, log_b, g, home) - self._points
        found = along(self._weights * move, self._order).cumsum(-1)[..., :-1]
        self._conductance = torch.where(found > 0, found, -torch.inf)

    def step(self, missing: Tensor) -> Tensor:
        """Return the stationary potential of sources of mass (*, N), in units of epsilon."""
        a = self._weights
        balanced = missing - a * missing.sum(-1, keepdim=True)
        flow = along(balanced, self._order).cumsum(-1)[..., :-1]
        slope = -flow * self._gaps / self._conductance
        slope = slope.clamp(-_MAX_DIFFERENCE_EPS, _MAX_DIFFERENCE_EPS)
        step = unsort(torch.nn.functional.pad(slope.cumsum(-1), (1, 0)), self._order)
        step = step - (a * step).sum(-1, keepdim=True)
        longest = step.abs().amax(-1, keepdim=True)
        return step * (_MAX_STEP_EPS / longest.clamp(min=_MAX_STEP_EPS))


def _average(kernel: Kernel, epsilon: float, log_b: Tensor, g: Tensor, values: Tensor) -> Tensor:
    """Return ``sum_j P(j | i) values_j``, (*, N): a ratio of two sums, each a softmin."""
    low = values.amin(-1, keepdim=True)
    weighted = kernel.softmin(epsilon, log_b + (values - low).log(), g)
    return low + ((kernel.softmin(epsilon, log_b, g) - weighted) / epsilon).exp()
