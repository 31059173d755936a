"""Clouds in space (D > 1): when iterations end, and what is said where that is too soon."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings

import pytest
import torch
from sinkhorn_cases import POWERS, clustered
from sinkhorn_reference import cost_matrix

from fairclip_losses.ops import ConvergenceWarning, sinkhorn_solve
from fairclip_losses.ops.dense import DenseKernel
from fairclip_losses.ops.options import SinkhornOptions
from fairclip_losses.ops.sinkhorn_loop import symmetric_loop
from fairclip_losses.ops.streamed import StreamedKernel


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dimension", [3, 20])
@pytest.mark.parametrize("share", [0.5, 1.7, 30.0])
def test_a_large_blur_takes_few_iterations(p, dimension, share, monkeypatch):
    """A blur above the diameter leaves little to do, for a measure against itself too."""
    x, rows, passes = uniform(900, dimension), (uniform(2, 900, seed=1) < 0.4).double(), []

    def update(self, *arguments, whole=StreamedKernel.update):
        passes.append(self)
        return whole(self, *arguments)

    monkeypatch.setattr(StreamedKernel, "update", update)
    result = sinkhorn_solve(x, x, None, rows, p=p, blur=share * dimension**0.5, tol=1e-9)
    assert result.iterations <= 25
    assert len(passes) - result.iterations <= 40  # of both self-terms
    assert result.converged.all()


def told(run):
    """Return what the run gives, and the iterations and the error of each warning it makes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    found = []
    for warning in caught:
        assert issubclass(warning.category, ConvergenceWarning)
        said = re.search(r"after (\d+) .* of the marginals of (\S+),", str(warning.message))
        found.append((int(said[1]), float(said[2])))
    return result, found


@pytest.mark.parametrize("backend", ["dense", "streamed"])
@pytest.mark.parametrize(("dimension", "p"), [(3, 2), (3, 1), (1, 2), (1, 1)])
def test_a_self_term_that_does_not_converge_says_so(backend, dimension, p):
    """Of the coupling of x with itself, alone, by its true error."""
    x, log_a = uniform(60, dimension), torch.full((60,), -math.log(60)).double()
    options = SinkhornOptions(p, 0.1, True, 0.5, None, 1e-6, 1, backend)
    kernel = (DenseKernel if backend == "dense" else StreamedKernel)(x, x, p)
    _, found = told(lambda: symmetric_loop(kernel, log_a, options))
    (iterations, error), = found  # fmt: skip
    mass = (-cost_matrix(x, x, p) / options.epsilon).exp().mean(-1)  # that of potentials 0
    assert iterations == 1 and error == pytest.approx((mass - 1).abs().mean().item(), rel=0.06)
    enough = dataclasses.replace(options, max_iterations=1000)
    assert told(lambda: symmetric_loop(kernel, log_a, enough))[1] == []


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
    """All iterations, and an error that the last update only lowers; none where that is met."""
    x, y, *_ = clustered(60, 60, 2)
    options = {"blur": 0.01, "debias": False, "tol": 1e-6, "backend": backend}
    result, found = told(lambda: sinkhorn_solve(x, y, max_iterations=limit, **options))
    assert len(found) == (0 if result.converged else 1)
    for iterations, error in found:
        assert iterations == result.iterations
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
