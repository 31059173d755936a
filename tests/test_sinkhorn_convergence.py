"""Clouds in space (D > 1): when rounds end, and what is said where that is too soon."""

from __future__ import annotations

import math

import pytest
import torch
from sinkhorn_cases import POWERS, one_thread

from fairclip_losses.ops import sinkhorn_solve
from fairclip_losses.ops.kernels.streamed import StreamedKernel
from fairclip_losses.ops.methods.progress import PATIENCE, Progress
from fairclip_losses.ops.methods.symmetric import solve_symmetric
from fairclip_losses.ops.options import SinkhornOptions


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with one_thread():
        yield


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dimension", [3, 20])
@pytest.mark.parametrize("share", [0.5, 1.7, 30.0])
def test_a_large_blur_takes_few_rounds(p, dimension, share, monkeypatch):
    """A blur above the diameter leaves little to do, for rough rounds in float32 too."""
    x = uniform(900, dimension)
    rows = (uniform(2, 900, seed=1) < 0.4).double()
    passes = []
    symmetric_pass = StreamedKernel.softmin_again

    def counted(self, *arguments):
        passes.append(self)
        return symmetric_pass(self, *arguments)

    monkeypatch.setattr(StreamedKernel, "softmin_again", counted)
    options = {"p": p, "blur": share * dimension**0.5, "tol": 1e-9}
    result = sinkhorn_solve(x, x, None, rows, **options)
    assert result.iterations <= 20
    assert len(passes) <= 60  # of either measure's own term
    assert result.converged.all()


def test_rounds_of_a_measure_against_itself_are_few(monkeypatch):
    """The symmetric solver alone, whose rough rounds are streamed too."""
    monkeypatch.setattr("fairclip_losses.ops.kernels.streamed._FEW", 0)
    x, passes = uniform(900, 3), []
    symmetric_pass = StreamedKernel.softmin_again

    def counted(self, *arguments):
        passes.append(self)
        return symmetric_pass(self, *arguments)

    monkeypatch.setattr(StreamedKernel, "softmin_again", counted)
    log_a = torch.full((900,), -math.log(900)).double()
    options = SinkhornOptions(2, 1.66 * 3**0.5, True, 0.5, None, 1e-9, 1000)
    f, _ = solve_symmetric(StreamedKernel(x, x, 2), log_a, options)
    assert len(passes) <= 30
    due = StreamedKernel(x, x, 2).softmin(options.epsilon, log_a, f)
    assert torch.expm1((f - due) / options.epsilon).abs().mean() <= 1e-9


@pytest.mark.parametrize("noise", [0.0, 0.04])
def test_rough_rounds_that_no_longer_improve_give_way(noise):
    """Above the floor that is expected of their rounding too; the better kernel's rounds go on."""
    rough, exact = Progress(1e-9), Progress(1e-9)
    rough.patience = PATIENCE
    errors = [2e-5 * (1 + noise * (-1) ** k) for k in range(200)]
    ended = [progress.ends for progress in (rough, exact)]
    rounds = [next((k for k, e in enumerate(errors) if ends(e)), None) for ends in ended]
    assert rounds[0] is not None and rounds[0] <= 2 * PATIENCE
    assert rounds[1] is None
