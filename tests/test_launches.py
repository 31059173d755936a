"""What the fairness term asks of a CUDA device, seen without one: launches, and never a value."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "benchmarks"))

from launches import launches


def _pretends() -> bool:
    """Whether tensors without values may say that they lie on a CUDA device that is not there."""
    try:
        with FakeTensorMode():
            torch.empty(1, device="cuda")[:, None].add(1).to(torch.int64)
    except (AssertionError, RuntimeError):  # torch without CUDA, or of 2.5
        return False
    return True


pytestmark = pytest.mark.skipif(not _pretends(), reason="this torch asks a fake device for itself")


@pytest.mark.parametrize(
    ("p", "blur", "groups", "n", "most"),
    [
        (1, 0.0, 3, 32, 30),
        (1, 0.0, 8, 1024, 30),
        (2, 0.0, 8, 1024, 45),
        (1, 0.05, 8, 512, 2300),
        (1, 0.05, 8, 1024, 7400),
        (2, 0.05, 3, 32, 2300),
        (2, 0.05, 8, 1024, 2300),
    ],
)
def test_few_launches_and_no_value_read_back(p, blur, groups, n, most):
    """Tensors without values raise where one is read; the number of groups makes no difference."""
    assert 20 < launches(p, blur, groups, n) <= most
    assert launches(p, blur, groups + 5, n // 2) <= most


def test_a_value_read_back_would_be_seen(monkeypatch):
    def reads(x, *_, **__):
        return x.sum() * float(x.amax())

    monkeypatch.setattr("fairclip_losses.functional.fairness.divergence", reads)
    with pytest.raises(DataDependentOutputException):
        launches(1, 0.0, 3, 32)
