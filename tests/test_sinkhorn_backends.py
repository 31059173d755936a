"""Every way to the same number: backends against each other, their limits, and the result type."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from no_read_back import as_on_an_accelerator
from sinkhorn_cases import POWERS, clouds, common_points, random_problem, value_and_gradients
from sinkhorn_reference import cost_matrix

from fairclip_losses.ops import SinkhornResult, sinkhorn_divergence, sinkhorn_solve
from fairclip_losses.ops.dense import DenseKernel
from fairclip_losses.ops.line import LaplaceLine
from fairclip_losses.ops.streamed import StreamedKernel

BACKENDS = {1: ("dense", "streamed", "prefix"), 2: ("dense", "streamed")}


def training_batch(n, groups=3):
    """Return scores (n, 1) and group weights (groups, n), the groups' means apart."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, groups, (n,), generator=draw)
    scores = torch.randn(n, generator=draw, dtype=torch.float64) + 0.2 * codes
    return scores[:, None], (codes == torch.arange(groups)[:, None]).double()


@pytest.mark.parametrize("p", POWERS)
@settings(max_examples=15)
@given(one=clouds(), other=clouds(rows=2))
def test_backends_agree_on_ragged_problems(p, one, other):
    (x, a), (y, b) = one, other
    dense, *rest = (
        sinkhorn_divergence(x, y, a, b, p=p, blur=0.5, backend=backend) for backend in BACKENDS[p]
    )
    for value in rest:
        torch.testing.assert_close(value, dense, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "p", "dimension"),
    [
        (StreamedKernel, 1, 1), (StreamedKernel, 2, 3), (StreamedKernel, 1, 20),
        (StreamedKernel, 2, 20), (LaplaceLine, 1, 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("blur", [1e-3, 0.3, 30.0])
@pytest.mark.parametrize("layout", ["common", "rows of weights", "clouds"])
def test_operators_are_those_of_the_dense_kernel(kind, p, dimension, blur, layout, monkeypatch):
    """Every operator, in many tiles, on points with ties and with absent ones, to rounding."""
    monkeypatch.setattr("fairclip_losses.ops.streamed._TILE_ENTRIES", 200)
    x, y, a, b = random_problem(40, 50, rows=3, dimension=dimension)
    x, y = (x * 8).round() / 8, (y * 8).round() / 8  # sums are exact: points meet, or do not
    if layout == "common":
        x, a = y, b[0]
    if layout == "clouds":
        y = torch.stack([y, y + 0.25])[:, None]
    log_a, log_b = (torch.where(w > 0.3, w, 0.0).log() for w in (a, b))
    g = torch.sin(3 * x[:, 0].mean() + torch.arange(50.0)).double().expand(3, -1)
    dense, kernel = DenseKernel(x, y, p), kind(x, y) if kind is LaplaceLine else kind(x, y, p)
    epsilon = blur**p
    # products lose half of the digits of points that meet
    close = {"rtol": 1e-10, "atol": 1e-11 if p == 2 or kind is LaplaceLine else 5e-7}
    softmin = dense.softmin(epsilon, log_b, g)
    torch.testing.assert_close(kernel.softmin(epsilon, log_b, g), softmin, **close)
    f, g_next = kernel.update(epsilon, log_a, log_b, g)
    _, due = dense.update(epsilon, log_a, log_b, g)
    # g may stay as it is where b is 0, and a pass moves it by some 700 epsilon at most
    there = (log_b > -torch.inf) & ((due - g).abs() < 600 * epsilon)
    torch.testing.assert_close(f, softmin, **close)
    torch.testing.assert_close(g_next.expand_as(due)[there], due[there], **close)
    back = kernel.transposed.transposed.gradient(epsilon, log_b, g)
    scale = 1.0 if p == 2 or kind is LaplaceLine else 1e3
    rounding = {"rtol": 1e-7, "atol": scale * 1e-9 * max(1.0, 1e-2 / blur) ** p}
    torch.testing.assert_close(back, dense.gradient(epsilon, log_b, g), **rounding)


@pytest.mark.parametrize("p", POWERS)
def test_many_points(p):
    """Ten thousand points, two groups: a size at which N x M would not do."""
    x, weights = training_batch(10_000, groups=2)
    x.requires_grad_()
    value = sinkhorn_divergence(x, x, None, weights, p=p, blur=0.2)
    value.sum().backward()
    if p == 2:  # the debiased value is near the exact one; for p = 1 that takes a smaller blur
        exact = sinkhorn_divergence(x, x, None, weights, p=p, blur=0)
        torch.testing.assert_close(value, exact, rtol=0.2, atol=0.0)
    direction = torch.cos(7 * x.detach())
    step = 1e-4
    moved = [
        sinkhorn_divergence(y, y, None, weights, p=p, blur=0.2).sum()
        for y in (x.detach() + step * direction, x.detach() - step * direction)
    ]
    slope = (moved[0] - moved[1]) / (2 * step)
    assert (x.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-3)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("n", [12, 400])
def test_result_is_a_solution(p, n):
    x, weights = training_batch(n)
    result = sinkhorn_solve(x, x, None, weights, p=p, blur=0.3)
    assert isinstance(result, SinkhornResult)
    assert result.converged.all()
    assert result.iterations >= 1
    assert (result.marginal_error < 1e-5).all()
    torch.testing.assert_close(result.cost, sinkhorn_divergence(x, x, None, weights, p=p, blur=0.3))
    a = torch.full((n,), 1 / n, dtype=torch.float64)
    for row, f, g, cost in zip(weights, result.f, result.g, result.transport_cost, strict=True):
        b = row / row.sum()
        matrix = cost_matrix(x, x, p)
        log = (f[:, None] + g - matrix) / 0.3**p
        plan = a[:, None] * b * log.exp()
        torch.testing.assert_close(plan.sum(1), a, rtol=0, atol=1e-5 / n)
        torch.testing.assert_close(plan.sum(0), b, rtol=0, atol=1e-5 / n)
        value = (plan * matrix).sum() + 0.3**p * (plan * log).sum()
        torch.testing.assert_close(cost, value, rtol=1e-5, atol=1e-9)


def test_result_says_where_it_did_not_converge():
    x, y, a, b = random_problem(20, 20, dimension=2)
    result = sinkhorn_solve(x, y, a, b, blur=0.05, iterations=1, backend="streamed")
    assert not result.converged.any()
    assert result.iterations == 1
    assert result.f_self.shape == (20,)
    assert sinkhorn_solve(x, y, a, b, debias=False).f_self is None


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((4, 2), {"backend": "keops"}, "backend must be one of .*, got 'keops'"),
        ((4, 2), {"backend": "prefix"}, "backend 'prefix' is for p = 1, got p = 2"),
        ((4, 2), {"backend": "prefix", "p": 1}, "'prefix' needs .* D = 1, got D = 2"),
        ((4, 1), {"blur": 0}, "needs blur > 0"),
        ((0, 1), {}, "needs points and rows"),
    ],
)
def test_what_cannot_be_solved(shape, arguments, message):
    x = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        sinkhorn_solve(x, x, **arguments)
    if "backend" in arguments:
        with pytest.raises(ValueError, match=message):
            sinkhorn_divergence(x, x, **arguments)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize(
    ("n", "blur", "debias"),
    [(12, 0.3, True), (12, 0.3, False), (140, 0.05, True), (140, 5e-4, True)],
)
def test_rows_with_points_of_their_own(p, n, blur, debias):
    """One after the other, to 1e-4 of the diameter; the dense path takes them at once."""
    x, y, a, b = random_problem(n, n - 3, rows=3)
    points = torch.stack([y, y + 0.1, 2 * y])
    options = {"p": p, "blur": blur, "debias": debias}
    value, slopes = value_and_gradients(x, points, a, b, **options)
    exact, due = value_and_gradients(x, points, a, b, backend="dense", tol=1e-9, **options)
    torch.testing.assert_close(value, exact, rtol=1e-8, atol=1e-12)
    for one, other in zip(slopes[:2], due[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    result = sinkhorn_solve(x, points, a, b, p=p, blur=blur)
    assert result.f.shape == (3, n) and result.g.shape == (3, n - 3) and result.converged.all()


@pytest.mark.parametrize(
    ("p", "n", "blur", "within"),
    [
        (1, 300, 2e-4, 2e-6), (1, 600, 2e-3, 2e-6), (1, 600, 2.0, 2e-6), (2, 300, 2e-4, 2e-6),
        (2, 600, 2e-3, 2e-6), (2, 600, 0.1, 2e-6),  # Newton's method
        (1, 1100, 2e-3, 2e-5), (2, 1100, 0.1, 2e-5),
    ],
)  # fmt: skip
def test_iterations_that_nobody_watches_are_enough(p, n, blur, within):
    """As on an accelerator, down to what docs/kernel.md says: held to the solvers on the CPU."""
    x = 2 * torch.rand(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    codes = torch.arange(n) % 2
    x[codes == 1] = 0.8 * x[codes == 1] + 0.2
    weights = (codes == torch.arange(2)[:, None]).double()
    due, found = _gradients_watched_or_not(x, weights, p, blur)
    assert float((found - due).norm()) <= within * float(due.norm())


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("share", [1e-4, 1e-2])
@pytest.mark.parametrize("kind", ["even", "uneven", "few"])
@pytest.mark.parametrize("layout", ["clusters", "normal"])
def test_they_are_enough_for_every_row(p, share, kind, layout):
    """Clusters and lonely points many blurs apart; groups of half, a third, and some hundredths."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(200, 1, generator=draw, dtype=torch.float64)
    if layout == "clusters":
        near = torch.rand(200, 1, generator=draw) < 0.8
        x = torch.where(near, 1e-3 * x, 2 * torch.rand(200, 1, generator=draw) - 1)
    weights = {
        "even": torch.arange(200) % 3 == torch.arange(3)[:, None],
        "uneven": torch.rand(3, 200, generator=draw) < 0.4,
        "few": torch.bucketize(torch.arange(200), torch.tensor([2, 10, 26]))
        == torch.arange(4)[:, None],
    }[kind].double()
    for row in weights:
        due, found = _gradients_watched_or_not(x, row[None], p, share * float(x.max() - x.min()))
        assert float((found - due).norm()) <= 2e-6 * float(due.norm())


def _gradients_watched_or_not(x, weights, p, blur):
    """Return the gradient as on the CPU and as on an accelerator."""
    options = {"p": p, "blur": blur, "tol": 1e-8}
    due = common_points(x, weights, **options)[1]
    with as_on_an_accelerator():
        return due, common_points(x, weights, **options)[1]
