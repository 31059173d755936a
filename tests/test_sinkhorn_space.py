"""Clouds in space (D > 1): the streamed kernel, its solver, small blurs, memory."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import ot
import pytest
import torch
from fairclip_losses.ops.entropic import solve_entropic
from fairclip_losses.ops.kernels.dense import DenseKernel
from fairclip_losses.ops.kernels.streamed import StreamedKernel
from fairclip_losses.ops.methods.anderson import Anderson
from fairclip_losses.ops.methods.progress import Progress
from hypothesis import given
from hypothesis import strategies as st
from sinkhorn_cases import POWERS, float64, one_thread, random_problem
from sinkhorn_reference import cost_matrix
from torch.profiler import ProfilerActivity, profile

from fairclip_losses.ops import ConvergenceWarning, sinkhorn_divergence, sinkhorn_solve
from fairclip_losses.ops.options import SinkhornOptions


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with one_thread():
        yield


def clustered(n, m, dimension, seed=0):
    """Return two samples of five narrow clusters: mass must move between them."""
    draw = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(5, dimension, generator=draw, dtype=torch.float64)
    clouds = [
        centres[torch.randint(0, 5, (count,), generator=draw)]
        + 0.1 * torch.randn(count, dimension, generator=draw, dtype=torch.float64)
        for count in (n, m)
    ]
    weights = [0.1 + torch.rand(count, generator=draw, dtype=torch.float64) for count in (n, m)]
    return *clouds, *weights


def diameter(x, y):
    both = torch.cat([x, y])
    return float((both.amax(0) - both.amin(0)).norm())


def value_and_slopes(x, y, a, b, **options):
    inputs = [t.clone().requires_grad_() for t in (x, y, a, b)]
    value = sinkhorn_divergence(*inputs, **options)
    value.sum().backward()
    return value.detach(), [t.grad for t in inputs]


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dimension", [2, 20])
def test_streamed_is_pots_plan(p, dimension):
    """Above the size of Newton's method: value and gradient off POT's converged plan."""
    x, y, a, b = random_problem(540, 500, rows=1, dimension=dimension)
    a, b = a / a.sum(), b[0] / b[0].sum()
    blur = 0.2 * diameter(x, y)
    cost = cost_matrix(x, y, p)
    plan = ot.bregman.sinkhorn_log(
        a.numpy(), b.numpy(), cost.numpy(), blur**p, stopThr=1e-11, numItermax=2000
    )
    kl = (plan * np.log(plan / np.outer(a, b))).sum()
    expected = (plan * cost.numpy()).sum() + blur**p * kl
    value, (grad_x, grad_y, _, _) = value_and_slopes(x, y, a, b, p=p, blur=blur, debias=False)
    assert value.item() == pytest.approx(expected, rel=1e-9)
    unit = (x[:, None] - y).numpy()
    if p == 1:
        unit = unit / cost.numpy()[..., None]
    for found, exact in (
        (grad_x, (plan[..., None] * unit).sum(1)),
        (grad_y, -(plan[..., None] * unit).sum(0)),
    ):
        assert np.linalg.norm(found.numpy() - exact) < 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dimension", [2, 20])
def test_streamed_is_dense_whatever_the_rows(p, dimension):
    """Rows of weights on common points, rows of points, and both; in float32 blocks near it."""
    x, y, a, b = random_problem(23, 31, rows=3, dimension=dimension)
    clouds = torch.stack([y, y + 0.2])[:, None]
    b[:, 4:9] = 0
    g = torch.sin(torch.arange(31.0)).double()
    epsilon = 0.5**p * dimension
    for points, weights in ((y, b[0]), (y, b), (clouds, b[0]), (clouds, b)):
        log_a, log_b = (a / a.sum()).log(), (weights / weights.sum(-1, keepdim=True)).log()
        dense, kernel = DenseKernel(x, points, p), StreamedKernel(x, points, p)
        softmin = dense.softmin(epsilon, log_b, g)
        torch.testing.assert_close(kernel.softmin(epsilon, log_b, g), softmin)
        torch.testing.assert_close(
            kernel.pull(epsilon, log_b, g), dense.pull(epsilon, log_b, g), rtol=1e-6, atol=1e-9
        )
        near = kernel.rough(epsilon, (10**9, 1, 1))
        assert near is not kernel
        torch.testing.assert_close(near.softmin(epsilon, log_b, g), softmin, rtol=0, atol=1e-4)
        f, after = kernel.sweep(epsilon, log_a, log_b, g)
        torch.testing.assert_close(f, softmin)
        back = dense.transposed.softmin(epsilon, log_a, softmin)
        there = (log_b > -torch.inf).expand_as(back)
        torch.testing.assert_close(after[there], back[there])
        torch.testing.assert_close(after[~there], g.expand_as(after)[~there])


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dimension", [1, 2, 20])
def test_a_symmetric_pass_is_a_whole_one(p, dimension, monkeypatch):
    monkeypatch.setattr("fairclip_losses.ops.kernels.blocks._BLOCK", 800)
    x, _, a, _ = random_problem(29, dimension=dimension)
    rows = torch.stack([a, a.flip(0)])
    rows[1, 3:7] = 0
    for points, weights in ((x, a), (x, rows), (torch.stack([x, 2 * x]), rows)):
        log_a = (weights / weights.sum(-1, keepdim=True)).log()
        kernel, there = StreamedKernel(points, points, p), log_a > -torch.inf
        f = torch.zeros_like(log_a)
        for _ in range(2):
            whole = kernel.softmin(0.3, log_a, f)
            torch.testing.assert_close(kernel.softmin_again(0.3, log_a, f)[there], whole[there])
            f = 0.5 * whole


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dimension", [2, 12])
@pytest.mark.parametrize("kind", [random_problem, clustered])
def test_small_blur_reaches_the_network_simplex(p, dimension, kind):
    """A ten-thousandth of the diameter: cost and gradient are those of POT's exact plan."""
    x, y, a, b = kind(60, 50, dimension=dimension)
    a, b = a / a.sum(), (b if b.dim() == 1 else b[0])
    b = b / b.sum()
    blur = 1e-4 * diameter(x, y)
    cost = cost_matrix(x, y, p)
    plan = ot.emd(a.numpy(), b.numpy(), cost.numpy())
    result = sinkhorn_solve(x, y, a, b, p=p, blur=blur, debias=False)
    assert result.converged
    exact = (plan * cost.numpy()).sum()
    assert exact * (1 - 1e-7) <= result.transport_cost.item() <= exact + 5 * blur**p
    if p == 2:  # at epsilon = 1e-8 of the cost the plan is that vertex
        _, (grad, _, _, _) = value_and_slopes(x, y, a, b, blur=blur, debias=False)
        shift = (plan[..., None] * (x[:, None] - y).numpy()).sum(1)
        assert np.linalg.norm(grad.numpy() - shift) < 1e-5 * np.linalg.norm(shift)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("share", [0.3, 0.05])
@pytest.mark.parametrize("kind", [random_problem, clustered])
def test_streamed_and_newton_agree(p, share, kind):
    """The two solvers have nothing in common but the problem."""
    x, y, a, b = kind(90, 110, dimension=3)
    options = {"p": p, "blur": share * diameter(x, y)}
    value, slopes = value_and_slopes(x, y, a, b, backend="streamed", **options)
    exact, truth = value_and_slopes(x, y, a, b, backend="dense", tol=1e-11, **options)
    torch.testing.assert_close(value, exact, rtol=1e-7, atol=0)
    for found, true in zip(slopes[:2], truth[:2], strict=True):
        assert (found - true).norm() < 1e-5 * true.norm()


@pytest.mark.parametrize("backend", ["dense", "streamed"])
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_loses_only_its_own_rounding(backend, p, dtype):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    truth = x.detach().double().requires_grad_()
    weights = (torch.arange(40) % 3 == torch.arange(3)[:, None]).double()
    value = sinkhorn_divergence(x, x, None, weights.to(dtype), p=p, blur=0.3, backend=backend)
    exact = sinkhorn_divergence(truth, truth, None, weights, p=p, blur=0.3, backend=backend)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-9)
    value.sum().backward()
    exact.sum().backward()
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(x.grad.double(), truth.grad, rtol=2 * rounding, atol=1e-7)


HARD = {
    "one point": (float64([[2.0, 1.0]]), float64([[1.0], [3.0]])),
    "identical points": (torch.full((6, 2), 0.4).double(), torch.rand(3, 6).double()),
    "all weight on one point": (random_problem(6, dimension=2)[0], torch.eye(6).double()[:3]),
    "ties": (random_problem(6, dimension=2)[0].round(), torch.rand(3, 6).double()),
    "a row of zeros": (random_problem(5, dimension=2)[0], float64([[0.0] * 5, [1.0] * 5])),
    "tiny weights": (random_problem(4, dimension=2)[0], float64([[1e-300, 1, 1e-12, 1]])),
    "two far clusters": (float64([[0, 0], [1e-3, 0], [1e3, 1e3]]), torch.rand(3, 3).double()),
    "one outlier": (float64([[0, 0], [0.1, 0.2], [1e8, 0]]), torch.rand(3, 3).double()),
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("backend", ["dense", "streamed"])
@pytest.mark.parametrize(("p", "blur"), [(1, 0.02), (1, 2.0), (2, 0.02), (2, 2.0)])
def test_never_a_nan(kind, backend, p, blur):
    points, table = HARD[kind]
    for (offset, scale), dtype in itertools.product(
        [(0.0, 1.0), (1e4, 1e-6)], [torch.float64, torch.float32]
    ):
        x = ((points + offset) * scale).to(dtype).requires_grad_()
        weights = table.to(dtype, copy=True).requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            value = sinkhorn_divergence(
                x, x, None, weights, p=p, blur=blur, backend=backend, max_iterations=6
            )
        value.sum().backward()
        assert value.isfinite().all()
        assert x.grad.isfinite().all()
        assert weights.grad.isfinite().all()


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("backend", ["dense", "streamed"])
def test_laws(p, backend):
    """Zero from a measure to itself, symmetry, common shifts, scaling; never below zero."""
    x, y, a, b = random_problem(30, 40, rows=2, dimension=3)
    weights = torch.stack([a, a.flip(0)])

    def divergence(x, y, a, b, blur=0.4):
        return sinkhorn_divergence(x, y, a, b, p=p, blur=blur, backend=backend)

    # plans that miss a marginal by tol cost at most that times the range of the potentials less
    short = 1e-9 if backend == "dense" else 1e-6 * diameter(x, x) ** p / p
    assert divergence(x, x, weights, weights).abs().max() < short
    assert divergence(x, x.clone(), a, a).abs() < short
    expected = divergence(x, y, a, b)
    assert (expected > 0).all()
    close = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(divergence(y, x, b, a), expected, **close)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    moved = divergence(x[order] + 1e4, y + 1e4, a[order], b)
    torch.testing.assert_close(moved, expected, **close)
    scaled = divergence(-7 * x, -7 * y, a, b, blur=2.8)
    torch.testing.assert_close(scaled, 7**p * expected, **close)


@pytest.mark.parametrize("backend", ["dense", "streamed"])
def test_a_shift_costs_half_its_square(backend):
    x, _, a, _ = random_problem(50, dimension=3)
    shift = float64([0.3, -0.5, 0.1])
    value = sinkhorn_divergence(x, x + shift, a, a, blur=0.5, backend=backend)
    assert value.item() == pytest.approx(0.5 * float(shift.square().sum()), rel=1e-7)


def test_what_does_not_converge_says_so():
    x, y, a, b = clustered(60, 60, 2)
    for backend in ("dense", "streamed"):
        with pytest.warns(ConvergenceWarning, match="stopped after .* above tol"):
            sinkhorn_divergence(x, y, a, b, blur=0.01, max_iterations=2, backend=backend)


@pytest.mark.parametrize("iterations", [1, 3, 30])
def test_fixed_rounds_end_at_the_target(iterations, monkeypatch):
    """So many passes, the last at the target: each marginal or value is that of epsilon."""
    x, y, a, b = random_problem(30, 20, rows=1, dimension=2)
    epsilons = []
    for kind in (DenseKernel, StreamedKernel):  # the costs of few points stay in memory

        def sweep(self, epsilon, *rest, whole=kind.sweep):
            epsilons.append(epsilon)
            return whole(self, epsilon, *rest)

        monkeypatch.setattr(kind, "sweep", sweep)
    result = sinkhorn_solve(x, y, a, b[0], blur=0.5, iterations=iterations, backend="streamed")
    assert len(epsilons) == result.iterations == iterations
    assert epsilons[-1] == 0.25
    reached = (b[0] / b[0].sum()) * torch.ones(20).double()
    log = (result.f[:, None] + result.g - cost_matrix(x, y, 2)) / 0.25
    columns = ((a / a.sum())[:, None] * reached * log.exp()).sum(0)
    torch.testing.assert_close(columns, reached)  # g answers f
    if iterations == 30:
        assert result.converged


@pytest.mark.parametrize("backend", ["dense", "streamed"])
@pytest.mark.parametrize(("p", "iterations"), [(1, 5), (2, None)])
def test_nothing_is_read_back_from_a_device(p, backend, iterations):
    """On the meta device, which has shapes and no values: reading one raises."""
    x, y, a, b = (t.to("meta") for t in random_problem(40, 30, rows=3, dimension=20))
    options = SinkhornOptions(p, 0.3, True, 0.5, iterations, 1e-6, 1000, backend)
    with torch.no_grad():
        solution = solve_entropic(x, y, a, b, options, [True] * 4)
    assert solution.cost.shape == (3,)
    assert [slope.shape for slope in solution.slopes] == [
        (3, 40, 20),
        (3, 30, 20),
        (3, 40),
        (3, 30),
    ]


def test_rounds_that_nobody_watches_converge(monkeypatch):
    """As on an accelerator: a fixed number of rounds, down through the annealing and at the end."""
    x, y, a, b = random_problem(60, 50, dimension=3)
    truth = sinkhorn_divergence(x, y, a, b, blur=0.3, tol=1e-11)
    monkeypatch.setattr(SinkhornOptions, "is_watched", lambda self, points: False)
    for backend in ("dense", "streamed"):
        value = sinkhorn_divergence(x, y, a, b, blur=0.3, backend=backend)
        torch.testing.assert_close(value, truth, rtol=1e-8, atol=0)


@pytest.mark.parametrize("few", [0, 2**20])
def test_weights_of_absent_points_have_their_gradients(few, monkeypatch):
    """Rounds may leave absent points out, the answer may not; nor does it matter what is kept."""
    monkeypatch.setattr("fairclip_losses.ops.kernels.streamed._FEW", few)
    x, y, a, b = random_problem(40, 45, rows=1, dimension=3)
    a[3:6] = 0
    _, slopes = value_and_slopes(x, y, a, b[0], blur=0.6, backend="streamed", tol=1e-9)
    _, exact = value_and_slopes(x, y, a, b[0], blur=0.6, backend="dense", tol=1e-11)
    for found, true in zip(slopes, exact, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("near", [0.0, 0.3, 90.0])
@pytest.mark.parametrize("dimension", [2, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_guess_of_the_potential_changes_nothing(near, dimension, dtype):
    """However far off it is, in units of epsilon."""
    x, y, a, b = random_problem(23, 31, rows=1, dimension=dimension)
    log_a, log_b, epsilon = (a / a.sum()).log(), (b[0] / b[0].sum()).log(), 4.0
    g = torch.sin(torch.arange(31.0)).double()
    kernel = StreamedKernel(x, y, 2, dtype)
    f, after = kernel.sweep(epsilon, log_a, log_b, g)
    guess = f + near * epsilon * torch.cos(torch.arange(23.0)).double()
    close = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 1e-11}
    for found, true in zip(kernel.sweep(epsilon, log_a, log_b, g, guess), (f, after), strict=True):
        torch.testing.assert_close(found, true, **close)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("step", [0.0, 0.5, 19.0, 200.0])
def test_a_kept_kernel_is_a_new_one(p, step):
    """A dense kernel that was formed at another potential gives what one formed here does."""
    x, y, a, b = random_problem(23, 31, rows=2, dimension=3)
    log_a, log_b = (a / a.sum()).log(), (b / b.sum(-1, keepdim=True)).log()
    g = torch.sin(torch.arange(31.0)).double().expand(2, -1)
    moved = g + step * 0.25 * torch.cos(torch.arange(31.0)).double()
    kept, new = DenseKernel(x, y, p), DenseKernel(x, y, p)
    kept.sweep(0.25, log_a, log_b, g)
    for name, arguments in (
        ("sweep", (0.25, log_a, log_b, moved)),
        ("conditional", (0.25, log_b, moved)),
        ("pull", (0.25, log_b, moved)),
    ):
        torch.testing.assert_close(getattr(kept, name)(*arguments), getattr(new, name)(*arguments))


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("epsilon", [1e-9, 1e-2, 30.0])
@pytest.mark.parametrize("rows", [1, 3])
def test_one_kernel_serves_all_rounds_of_a_measure_against_itself(p, epsilon, rows):
    """Where it has mass, however little; elsewhere nothing infinite comes of it."""
    x, _, a, _ = random_problem(23, 31, rows=rows, dimension=3)
    a = a * torch.ones(rows, 1)
    a[:, 0], a[:, 1], a[:, 2] = 0, 1e-30, 1e-300
    log_a = (a / a.sum(-1, keepdim=True)).log()
    kernel = DenseKernel(x, x, p)
    f = 0.5 * kernel.softmin(epsilon, log_a, torch.zeros_like(log_a))
    update = kernel.softmin_within(epsilon, log_a)
    for _ in range(3):
        due, found = kernel.softmin(epsilon, log_a, f), update(f)
        torch.testing.assert_close(found[:, 1:], due[:, 1:], rtol=1e-12, atol=1e-12 * epsilon)
        assert found.isfinite().all()
        f = found


@pytest.mark.parametrize("dimension", [2, 20])
def test_a_measure_pulls_on_itself_as_on_another(dimension, monkeypatch):
    monkeypatch.setattr("fairclip_losses.ops.kernels.blocks._BLOCK", 800)
    x, _, a, _ = random_problem(29, dimension=dimension)
    rows = torch.stack([a, a.flip(0)])
    rows[1, 3:7] = 0
    log_a = (rows / rows.sum(-1, keepdim=True)).log()
    kernel, other = StreamedKernel(x, x, 2), StreamedKernel(x, x.clone(), 2)
    f = 0.5 * kernel.softmin(3.0, log_a, torch.zeros_like(log_a))
    there = (log_a > -torch.inf)[..., None]
    pulls = [torch.where(there, each.pull(3.0, log_a, f), 0.0) for each in (kernel, other)]
    torch.testing.assert_close(*pulls)
    steep = 1e5 * torch.cos(torch.arange(29.0)).double()  # no potential: the plan overflows
    torch.testing.assert_close(kernel.pull(3.0, log_a, steep), other.pull(3.0, log_a, steep))
    less = torch.ones(29, dimension).double()
    torch.testing.assert_close(
        other.pull(3.0, log_a, f, less.clone()), other.pull(3.0, log_a, f) - less
    )


@given(st.floats(0.0, 0.95), st.floats(1e-9, 1e-2))
def test_rounds_end_where_the_way_that_is_left_is_short(rate, left):
    """Errors that are a geometric series: what is left of it when they end is what was asked."""
    progress, error, rounds = Progress(1e-2, left), 1.0, 1
    while not progress.ends(error):
        error, rounds = error * rate, rounds + 1
        assert rounds < 2000
    assert error * rate / (1.0 - rate) <= left * (1 + 1e-6)
    assert error <= 1e-2


def test_anderson_solves_a_linear_map():
    """On a linear map it is GMRES: 10 rounds do where plain ones leave 99 % of the slow mode."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=draw, dtype=torch.float64)).Q
    matrix = basis @ torch.diag(float64([0.999, 0.9, 0.5, 0.2, 0.0])) @ basis.T
    start = torch.randn(3, 5, generator=draw, dtype=torch.float64)
    memory, g = Anderson(torch.full((5,), -np.log(5)).double()), start
    for _ in range(10):
        g = memory.step(g, g @ matrix, -g.square().sum(-1), 1e9)
    free = g - g.mean(-1, keepdim=True)  # potentials are free of a constant
    assert free.abs().max() < 1e-6


def peak_bytes(run):
    """Return the most that the CPU allocator had given out at a time, to operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(torch.tensor([event.nbytes() for event in events]).cumsum(0).max())


@pytest.mark.parametrize("p", POWERS)
def test_memory_is_linear(p):
    """4096 x 4096 costs would be 64 MiB in float32."""
    x = torch.randn(4096, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = x.detach() + 0.5

    def run():
        sinkhorn_divergence(x, y, p=p, blur=0.5, iterations=2).backward()

    assert 2**18 < peak_bytes(run) < 8 * 2**20
