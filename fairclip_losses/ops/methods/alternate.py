"""Potentials of clouds in space (D > 1) by alternate updates: annealing, then acceleration."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import broadcast_shapes, is_readable
from ..kernels.kinds import SpaceKernel
from ..kernels.streamed import StreamedKernel
from ..options import SinkhornOptions
from .anderson import Anderson
from .annealing import Annealing, Behind
from .progress import PATIENCE, Progress
from .sparse import descend
from .station import Station, settle

# Rounds where nothing may be read back from the device, so that no test can end them.
_UNWATCHED_ROUNDS = 100
# Marginal error at which a station on the way down is settled, its most rounds, and the rounds up
# to which the next one is near enough.
_TOL_ON_THE_WAY, _ROUNDS_ON_THE_WAY, _EASY = 0.03, 100, 2
# Stations above which they are settled better where Newton's method may follow: the levels of
# groups far apart are found at large epsilons only.
_MANY_STATIONS, _TOL_OF_MANY = 6, 1e-3
# Rounds at the target before Newton's method on the plan's entries is tried there.
_BEFORE_NEWTON = 60
# Of a fixed number of rounds at the target, one of so many is no rough one.
_PRECISE = 4


def alternate(
    kernel: SpaceKernel, log_a: Tensor, log_b: Tensor, options: SinkhornOptions,
    patience: int | None = None,
) -> tuple[Tensor, Tensor, int, float | None]:  # fmt: skip
    """Return the potentials f and g of ``OT_eps(a, b)``, the rounds taken and the error, if known.

    Where convergence is watched, each epsilon on the way down is a station, settled roughly, as
    the potentials of the next one are near only then. Otherwise it has one round; of
    ``options.iterations`` rounds all but the last may go by in that. After about ``patience``
    rounds in all this ends wherever it is.
    """
    watched, target = options.is_watched(kernel.x), options.epsilon
    annealing = Annealing(kernel.x, kernel.y, options, options.scaling)
    down, most = annealing.rounds, options.max_iterations if watched else _UNWATCHED_ROUNDS
    if options.iterations is not None:
        down = min(down, options.iterations - 1)
        most = options.iterations - down
    elif patience is not None:
        most = min(most, patience)
    quick: SpaceKernel = kernel
    if isinstance(kernel, StreamedKernel):
        quick = kernel.rough(target, broadcast_shapes(log_a.shape[:-1], log_b.shape[:-1]))
    many = isinstance(kernel, StreamedKernel) and annealing.rounds > _MANY_STATIONS
    at, taken, behind = Station(None, torch.zeros_like(log_b), 0, None), 0, Behind()
    for k in range(down):
        epsilon = annealing(k)
        if watched:
            at = at._replace(g=behind.foreseen(quick, at.g, log_a, log_b, epsilon))
            near = Progress(_TOL_OF_MANY if many else _TOL_ON_THE_WAY)
            at = settle(quick, at, log_a, log_b, epsilon, near, _ROUNDS_ON_THE_WAY)
            behind.pass_by(at.g, epsilon, steep=at.rounds > _EASY)
            if isinstance(kernel, StreamedKernel) and _EASY < at.rounds < most - taken:
                solved = descend(kernel, log_a, log_b, options, at, epsilon)
                if solved is not None:
                    return *solved[:2], taken + at.rounds + solved.rounds, solved.error
        else:
            at = settle(quick, at, log_a, log_b, epsilon, None, 1)
        taken += at.rounds
        if patience is not None and taken >= patience:
            most = 1
            break
    progress = Progress(options.tol, kernel.spare * options.tol) if watched else None
    if progress is not None and quick is not kernel:
        progress.patience = PATIENCE
        at = settle(quick, at, log_a, log_b, target, progress, most)
        progress.patience = math.inf
        taken += at.rounds
    elif quick is not kernel and most > 1:
        at = settle(quick, at, log_a, log_b, target, None, most - math.ceil(most / _PRECISE))
        taken += at.rounds
        most -= at.rounds
    memory = Anderson(log_b, kernel.rounding if progress is not None else 0.0)
    first = min(most, _BEFORE_NEWTON)
    at = settle(kernel, at, log_a, log_b, target, progress, first, memory)
    if at.rounds == first < most:
        if isinstance(kernel, StreamedKernel) and progress is not None:
            solved = descend(kernel, log_a, log_b, options, at, target)
            if solved is not None:
                return *solved[:2], taken + first + solved.rounds, solved.error
        assert at.ahead is not None  # a round was taken
        ahead, taken = at._replace(g=at.ahead), taken + first
        at = settle(kernel, ahead, log_a, log_b, target, progress, most - first, memory)
    f, g, rounds, error, _ = at
    assert f is not None  # a round was taken
    if not (
        is_readable(log_b) and bool((log_b > -torch.inf).all())
    ):  # a sweep leaves absent points out
        g = kernel.transposed.softmin(target, log_a, f)
    return f, g, taken + rounds, error
