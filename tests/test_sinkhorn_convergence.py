"""Clouds in space (D > 1): when rounds end, and what is said where that is too soon."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings

import pytest
import torch
from fairclip_losses.ops.kernels.streamed import StreamedKernel
from fairclip_losses.ops.methods.progress import PATIENCE, Progress
from fairclip_losses.ops.methods.symmetric import solve_symmetric
from fairclip_losses.ops.problem import choose_kernel
from sinkhorn_cases import POWERS, one_thread
from sinkhorn_reference import cost_matrix

from fairclip_losses.ops import ConvergenceWarning, sinkhorn_solve
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


def told(run):
    """Return what the run gives, and the rounds and the error of each warning it makes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    found = []
    for warning in caught:
        assert issubclass(warning.category, ConvergenceWarning)
        said = re.search(r"after (\d+) rounds .* of the marginals of (\S+),", str(warning.message))
        found.append((int(said[1]), float(said[2])))
    return result, found


@pytest.mark.parametrize(
    ("backend", "dimension", "p", "limit"),
    [
        ("dense", 3, 2, 2), ("streamed", 3, 2, 2), ("dense", 3, 1, 2), ("streamed", 3, 1, 2),
        ("dense", 1, 2, 1), ("dense", 1, 1, 1), ("streamed", 1, 2, 2),
    ],
)  # fmt: skip
def test_a_term_of_its_own_that_does_not_converge_says_so(backend, dimension, p, limit):
    """Of the plan of x with itself, alone: that of the pair is met."""
    x = uniform(60, dimension)
    log_a = torch.full((60,), -math.log(60)).double()
    options = SinkhornOptions(p, 0.1, True, 0.5, None, 1e-6, limit, backend)
    kernel = choose_kernel(x, x, options, 1)
    (f, _), found = told(lambda: solve_symmetric(kernel, log_a, options))
    (_, error), = found  # fmt: skip
    log_plan = (f[:, None] + f - cost_matrix(x, x, p)) / options.epsilon
    missed = (log_plan.exp().sum(-1) / 60 - 1).abs().mean()
    assert error == pytest.approx(missed.item(), rel=0.06)  # shown to two digits
    assert error > options.tol
    enough = dataclasses.replace(options, max_iterations=1000)
    assert told(lambda: solve_symmetric(kernel, log_a, enough))[1] == []


@pytest.mark.parametrize("backend", ["dense", "streamed"])
@pytest.mark.parametrize("p", POWERS)
def test_a_divergence_whose_own_terms_do_not_converge_says_so(backend, p):
    """Whatever is said of the pair, which Newton's method may have met."""
    x, rows = uniform(80, 3), uniform(2, 80, seed=1)
    options = {"p": p, "blur": 0.3, "max_iterations": 2, "backend": backend}
    result, found = told(lambda: sinkhorn_solve(x, x, None, rows, **options))
    _, of_the_pair = told(lambda: sinkhorn_solve(x, x, None, rows, debias=False, **options))
    assert len(found) == len(of_the_pair) + 2
    assert not result.converged.any()


@pytest.mark.parametrize("backend", ["dense", "streamed"])
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_the_warning_says_what_was_measured(backend, limit):
    """All rounds, and an error that the last update only lowers; none where that is met."""
    draw = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(5, 2, generator=draw, dtype=torch.float64)
    x, y = (
        centres[torch.randint(0, 5, (60,), generator=draw)]
        + 0.1 * torch.randn(60, 2, generator=draw, dtype=torch.float64)
        for _ in range(2)
    )
    options = {"blur": 0.01, "debias": False, "tol": 1e-6, "backend": backend}
    result, found = told(lambda: sinkhorn_solve(x, y, max_iterations=limit, **options))
    assert len(found) == (0 if result.converged else 1)
    for rounds, error in found:
        assert rounds == result.iterations
        assert options["tol"] < result.marginal_error.item() <= 1.05 * error


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dimension", [1, 3])
@pytest.mark.parametrize("limit", range(1, 7))
def test_what_newton_converged_is_not_warned_of(p, dimension, limit):
    """However far it was before its last step."""
    x, y = uniform(60, dimension), uniform(50, dimension, seed=1) + 0.1
    options = {"p": p, "blur": 0.3, "debias": False, "max_iterations": limit, "backend": "dense"}
    result, found = told(lambda: sinkhorn_solve(x, y, **options))
    if result.marginal_error.item() < 1e-8:  # far below tol
        assert found == []
    if not result.converged:
        assert len(found) == 1
