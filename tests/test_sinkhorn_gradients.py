"""Gradients of the divergence: finite differences, unrolled autograd, POT, the plan."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from sinkhorn_cases import POWERS, clouds, pot_solution, random_problem, value_and_gradients
from sinkhorn_reference import cost_matrix, sinkhorn_divergence_reference
from torch.autograd import gradcheck

from fairclip_losses.ops import sinkhorn_divergence


def wanting(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize(
    ("blur", "dimension"), [(0.0, 1), (0.05, 1), (0.5, 1), (3.0, 1), (0.05, 2), (0.8, 3)]
)
@pytest.mark.parametrize("debias", [True, False])
def test_gradcheck_of_points_and_weights(p, blur, dimension, debias):
    inputs = wanting(*random_problem(3, 4, rows=2, dimension=dimension, seed=3))

    def divergence(x, y, a, b):
        return sinkhorn_divergence(x, y, a, b, p=p, blur=blur, debias=debias)

    assert gradcheck(divergence, inputs, fast_mode=dimension > 1)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("blur", [0.0, 0.05, 0.5])
def test_gradcheck_on_common_points(p, blur):
    x, _, a, _ = random_problem(8)
    weights = torch.stack([a * (torch.arange(8) % 3 == row) for row in range(3)])
    inputs = wanting(x, a)
    assert gradcheck(lambda x, a: sinkhorn_divergence(x, x, a, weights, p=p, blur=blur), inputs)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("blur", [0.4, 1.5])
@pytest.mark.parametrize("dimension", [1, 2])
def test_envelope_equals_autograd_through_the_reference(p, blur, dimension):
    x, y, a, b = random_problem(5, 6, rows=1, dimension=dimension, seed=2)
    _, slopes = value_and_gradients(x, y, a, b[0], p=p, blur=blur)
    unrolled = wanting(x, y, a, b[0])
    sinkhorn_divergence_reference(*unrolled, p=p, blur=blur, iterations=1500).backward()
    for mine, theirs in zip(slopes, unrolled, strict=True):
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("blur", [0.4, 1.5])
def test_envelope_equals_pots(blur):
    """POT's plan gives d OT / d x; its own envelope gives the same up to its convergence."""
    x, y, a, b = random_problem(6, 7, rows=1, seed=5)
    a, b = a / a.sum(), b[0] / b[0].sum()
    points, others = wanting(x, y)
    sinkhorn_divergence(points, others, a, b, blur=blur, debias=False).backward()
    options = {"stopThr": 1e-14, "numItermax": 100_000}
    *_, grad_x, grad_y = pot_solution(x, y, a, b, 2, blur, **options)
    np.testing.assert_allclose(points.grad, grad_x, atol=1e-8)
    np.testing.assert_allclose(others.grad, grad_y, atol=1e-8)

    (pot_points,) = wanting(x)
    solution = ot.solve(
        cost_matrix(pot_points, y, 2), a, b, reg=blur**2, reg_type="KL", max_iter=100_000,
        tol=1e-13, grad="envelope",
    )  # fmt: skip
    solution.value.backward()
    torch.testing.assert_close(points.grad, pot_points.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("blur", [0.0, 0.1])
@settings(max_examples=20)
@given(cloud=clouds(rows=2))
def test_points_without_weight_do_nothing(p, blur, cloud):
    """A ragged row with zero weights is the same problem without those points."""
    x, weights = cloud
    (points,) = wanting(x)
    values = sinkhorn_divergence(points, points, weights[0], weights, p=p, blur=blur)
    for row, value in zip(weights, values, strict=True):
        there, others = weights[0] > 0, row > 0
        alone = sinkhorn_divergence(
            x[there], x[others], weights[0][there], row[others], p=p, blur=blur
        )
        assert value.item() == pytest.approx(alone.item(), rel=1e-6, abs=1e-9)
    values.sum().backward()
    assert points.grad.isfinite().all()
    assert not points.grad[(weights == 0).all(0)].any()


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize(("blur", "dimension"), [(0.0, 1), (0.2, 1), (0.2, 2)])
def test_the_same_tensor_twice_is_a_clone(p, blur, dimension):
    x, _, a, _ = random_problem(9, dimension=dimension)
    weights = torch.stack([a, a.flip(0)])
    (together,) = wanting(x)
    one = sinkhorn_divergence(together, together, a.cos(), weights, p=p, blur=blur)
    one.sum().backward()
    two, (of_x, of_y, *_) = value_and_gradients(x, x.clone(), a.cos(), weights, p=p, blur=blur)
    torch.testing.assert_close(one.detach(), two)
    torch.testing.assert_close(together.grad, of_x + of_y)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("blur", [0.0, 0.05, 1.0])
def test_a_collapsed_batch_is_not_torn_apart(p, blur):
    x = torch.full((6, 1), 0.3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 6, dtype=torch.float64)
    sinkhorn_divergence(x, x, None, weights, p=p, blur=blur).sum().backward()
    assert x.grad.abs().max() < 1e-12


@pytest.mark.parametrize("blur", [0.0, 0.5])
def test_a_second_derivative_is_refused(blur):
    x, y, a, b = random_problem()
    (points,) = wanting(x)
    value = sinkhorn_divergence(points, y, a, b, blur=blur).sum()
    (gradient,) = torch.autograd.grad(value, points, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("blur", [0.0, 0.5])
def test_rows_without_mass_cost_nothing(blur):
    x, y, a, b = random_problem(rows=3)
    b[1] = 0
    values, slopes = value_and_gradients(x, y, a, b, blur=blur)
    assert values[1] == 0 and not slopes[3][1].any()
    assert (values[[0, 2]] > 0).all()
    _, alone = value_and_gradients(x, y, a, b[[0, 2]], blur=blur)
    for with_empty, without in zip(slopes[:3], alone[:3], strict=True):
        torch.testing.assert_close(with_empty, without)
