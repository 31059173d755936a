"""What the fairness term asks of a CUDA device, seen without one: launches, and never a value."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "benchmarks"))

from launches import launches

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="torch was built without CUDA"
)


@pytest.mark.parametrize(
    ("p", "blur", "groups", "n", "most"),
    [
        (1, 0.0, 3, 32, 55),
        (1, 0.0, 8, 1024, 55),
        (2, 0.0, 8, 1024, 90),
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
    def reads(scores, *_, **__):
        return float(scores.sum())

    monkeypatch.setattr("fairclip_losses.losses.sinkhorn_fairness.sinkhorn_fairness", reads)
    with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
        launches(1, 0.0, 3, 32)
