"""What holds for every problem: symmetry, invariances, bounds, and never a NaN."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sinkhorn_cases import (
    BLURS,
    HARD,
    POWERS,
    clouds,
    common_points,
    float64,
    never_a_nan,
    random_problem,
)

from fairclip_losses.ops import sinkhorn_divergence

TOL = 1e-6  # the default of `sinkhorn_divergence`

quick = settings(max_examples=15)
every_kind = pytest.mark.parametrize(("p", "blur"), list(itertools.product(POWERS, BLURS)))


@every_kind
@quick
@given(cloud=clouds())
def test_zero_from_a_measure_to_itself(p, blur, cloud):
    x, a = cloud
    assert sinkhorn_divergence(x, x.clone(), a, a, p=p, blur=blur).abs() < 1e-9
    assert sinkhorn_divergence(x, x, a, a, p=p, blur=blur).abs() < 1e-9


@every_kind
@quick
@given(one=clouds(), other=clouds())
def test_symmetric_and_not_negative(p, blur, one, other):
    (x, a), (y, b) = one, other
    there = sinkhorn_divergence(x, y, a, b, p=p, blur=blur)
    back = sinkhorn_divergence(y, x, b, a, p=p, blur=blur)
    torch.testing.assert_close(there, back, rtol=1e-6, atol=1e-8)
    # The solver stops where the plan misses a marginal by tol. That far from the optimum the value
    # of the dual is below OT_eps by at most the miss times how much the potentials still have to
    # change, half of twice their range, which is at most that of the cost, diameter^p / p. The
    # costs within a and within b are such lower bounds too, and are subtracted.
    diameter = float(torch.cat([x, y]).max() - torch.cat([x, y]).min())
    short = 0.0 if blur == 0 else TOL * diameter**p / p
    assert there > -short - 1e-9


@every_kind
@quick
@given(one=clouds(), other=clouds(), shift=st.floats(-100, 100), seed=st.integers(0, 9))
def test_invariant_to_order_and_common_shift(p, blur, one, other, shift, seed):
    (x, a), (y, b) = one, other
    expected = sinkhorn_divergence(x, y, a, b, p=p, blur=blur)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    moved = sinkhorn_divergence(x[order] + shift, y + shift, a[order], b, p=p, blur=blur)
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-8)


@every_kind
@quick
@given(one=clouds(), other=clouds(), scale=st.sampled_from([1e-3, 0.5, -2.0, 1e3]))
def test_scale_law(p, blur, one, other, scale):
    """S(t x, t y; |t| blur) = |t|^p S(x, y; blur)."""
    (x, a), (y, b) = one, other
    expected = abs(scale) ** p * sinkhorn_divergence(x, y, a, b, p=p, blur=blur)
    scaled = sinkhorn_divergence(scale * x, scale * y, a, b, p=p, blur=abs(scale) * blur)
    torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=1e-8 * abs(scale) ** p)


@every_kind
@quick
@given(cloud=clouds(rows=3))
def test_mass_does_not_matter(p, blur, cloud):
    x, weights = cloud
    one = sinkhorn_divergence(x, x, None, weights, p=p, blur=blur)
    two = sinkhorn_divergence(
        x, x, None, weights * float64([[3.0], [1e-300], [1e6]]), p=p, blur=blur
    )
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


@every_kind
def test_leading_dimensions_broadcast(p, blur):
    x, y, a, b = random_problem(rows=6)
    b = b.view(2, 3, 9)
    whole = sinkhorn_divergence(x, y, a, b, p=p, blur=blur)
    assert whole.shape == (2, 3)
    clouds_of_y = y.expand(2, 1, 9, 1) + float64([0.0, 0.5]).view(2, 1, 1, 1)
    moved = sinkhorn_divergence(x, clouds_of_y, None, b, p=p, blur=blur)
    assert moved.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        alone = sinkhorn_divergence(x, y, a, b[i, j], p=p, blur=blur)
        torch.testing.assert_close(whole[i, j], alone, rtol=1e-6, atol=1e-9)
        alone = sinkhorn_divergence(x, y + 0.5 * i, None, b[i, j], p=p, blur=blur)
        torch.testing.assert_close(moved[i, j], alone, rtol=1e-6, atol=1e-9)
    assert sinkhorn_divergence(x, y, p=p, blur=blur).shape == ()
    assert sinkhorn_divergence(x, y[None], p=p, blur=blur).shape == (1,)


@pytest.mark.parametrize("kind", HARD)
@every_kind
def test_never_a_nan(kind, p, blur):
    places = itertools.product([0.0, 1e4], [1.0, 1e-6, 1e6])
    never_a_nan(kind, 1, places, p=p, blur=blur, iterations=4)


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("backend", ["dense", "streamed"])
@pytest.mark.parametrize(("p", "blur"), [(1, 0.02), (1, 2.0), (2, 0.02), (2, 2.0)])
@pytest.mark.filterwarnings("ignore::fairclip_losses.ops.ConvergenceWarning")
def test_never_a_nan_in_the_plane(kind, backend, p, blur):
    options = {"p": p, "blur": blur, "backend": backend, "max_iterations": 6}
    never_a_nan(kind, 2, [(0.0, 1.0), (1e4, 1e-6)], **options)


@every_kind
def test_an_offset_costs_no_digits(p, blur):
    """Scores near 1e4 in float32 differ in few digits; those that they have must count."""
    generator = torch.Generator().manual_seed(0)
    x = 1e4 + torch.randn(64, 1, generator=generator)
    weights = torch.rand(3, 64, generator=generator)
    value, grad, _ = common_points(x, weights, p=p, blur=blur)
    exact, exact_grad, _ = common_points(x.double(), weights.double(), p=p, blur=blur)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-8)
