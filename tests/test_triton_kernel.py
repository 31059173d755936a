"""The fused kernel in Triton's interpreter, against the dense kernel; and compiled for a GPU.

The interpreter is chosen when Triton is first imported, so these tests run in a process of theirs.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from sinkhorn_cases import POWERS, random_problem, value_and_gradients

from fairclip_losses.ops import options, sinkhorn_divergence, sinkhorn_solve
from fairclip_losses.ops.dense import DenseKernel

triton = pytest.importorskip(
    "triton", "3.2", reason="the kernel needs Triton 3.2, which comes with torch 2.6"
)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
outside = pytest.mark.skipif(INTERPRETED, reason="runs outside of the interpreter")


@outside
def test_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@outside
@pytest.mark.parametrize(("p", "with_gradient"), [(1, True), (2, False)])
def test_compiles_for_a_gpu(p, with_gradient):
    """To machine code, by the compiler in Triton's package: no GPU is needed for that."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fairclip_losses.ops import triton_softmin

    kernel, double = triton_softmin._reduce, "*fp64"
    types = dict.fromkeys(kernel.arg_names, double)
    types |= dict.fromkeys(("cloud_x", "cloud_y"), "*i64")
    types |= dict.fromkeys(("n", "m", "dimension"), "i32")
    constants = {"P": p, "GRADIENT": with_gradient, "ROWS": 16, "COLUMNS": 32, "COORDINATES": 16}
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel, signature=types,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )  # fmt: skip
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]


@outside
@pytest.mark.parametrize(("version", "runs"), [("3.1.0", False), ("3.2.0", True), ("4.0", True)])
def test_an_older_triton_is_not_taken(monkeypatch, version, runs):
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options._has_triton.cache_clear()
    assert options.runs_triton(torch.zeros(4, 2)) == runs
    options._has_triton.cache_clear()


@outside
def test_needs_a_gpu():
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"'triton' needs .* a CUDA device, got points on cpu"):
        sinkhorn_divergence(x, x, backend="triton")


@interpreted
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize(("dimension", "dtype"), [(3, torch.float32), (18, torch.float64)])
def test_operators_are_those_of_the_dense_kernel(p, dimension, dtype):
    """No size a multiple of a block's; ties, absent points, rows of weights and of points."""
    from fairclip_losses.ops.triton_softmin import TritonKernel

    x, y, a, b = random_problem(19, 131, rows=2, dimension=dimension)
    y[:3] = x[:3]
    b[:, 5:40] = 0
    x, y, a, b = (t.to(dtype) for t in (x, y, a, b))
    clouds = torch.stack([y, y + 0.5])[:, None]
    log_a, log_b = (a / a.sum()).log(), (b / b.sum(-1, keepdim=True)).log()
    g = torch.sin(torch.arange(131.0)).to(dtype)
    on_device = torch.tensor(1.0, dtype=dtype)
    for points, epsilon in ((y, 0.4), (clouds, on_device))[: 1 if dimension > 9 else 2]:
        dense, kernel = DenseKernel(x, points, p), TritonKernel(x, points, p)
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
        f = dense.softmin(epsilon, log_b, g)
        torch.testing.assert_close(kernel.softmin(epsilon, log_b, g), f, **close)
        found, after = kernel.update(epsilon, log_a, log_b, g)
        torch.testing.assert_close(found, f, **close)
        torch.testing.assert_close(after, dense.transposed.softmin(epsilon, log_a, f), **close)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-9}
    dense, kernel = DenseKernel(x, y, p), TritonKernel(x, y, p)
    found, due = (each.gradient(0.4, log_b, g) for each in (kernel, dense))
    torch.testing.assert_close(found, due, **close)


@interpreted
@pytest.mark.parametrize(("p", "dimension"), [(1, 2), (2, 1)])
def test_the_whole_divergence(p, dimension):
    x, y, a, b = random_problem(20, 17, rows=2, dimension=dimension)
    b[0, 3] = 0
    value, slopes = value_and_gradients(x, y, a, b, p=p, blur=1.0, backend="triton")
    exact, truth = value_and_gradients(x, y, a, b, p=p, blur=1.0, backend="dense", tol=1e-10)
    torch.testing.assert_close(value, exact, rtol=1e-7, atol=1e-10)
    for found, expected in zip(slopes, truth, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert sinkhorn_solve(x, y, a, b, p=p, blur=1.0, backend="triton").converged.all()
