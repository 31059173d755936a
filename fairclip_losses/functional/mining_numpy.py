"""What mining computes for a batch on the CPU, in NumPy: its calls take a third of torch's time.

A batch has some hundred pairs, so it is the number of calls that counts, not the arithmetic. The
functions work on the memory of the tensors that they are given, which are not under autograd.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .mining import Weighting


def takes(values: Tensor) -> bool:
    """Whether values are a plain tensor on the CPU, outside of a graph under compilation."""
    return (
        values.device.type == "cpu" and type(values) is Tensor and not torch.compiler.is_compiling()
    )


def pair_weights(
    losses: Tensor, kinds: Tensor, mean: float, std: float, weighting: Weighting
) -> Tensor:
    """Return what `bad_pair_weights` does, to the last bit.

    Args:
        losses: (B,) float32 or float64, without gradient.
        kinds: (B,) codes.
        mean: of the histories.
        std: of the histories.
        weighting: ``"relative"`` or ``"density"``.
    """
    values = losses.numpy()
    with np.errstate(all="ignore"):  # as torch does
        weights = _weights(values, kinds.numpy(), mean, std, weighting)
    weights[~np.isfinite(values)] = 1.0
    return torch.from_numpy(weights)


def visit(
    losses: Tensor,
    ids: Tensor,
    memory: Mapping[str, Tensor | None],
    weighting: Weighting,
    *,
    record: bool,
    visit_weight: float = 1.0,
) -> Tensor | None:
    """Weigh a batch and record it, all in one; None where a loss is not finite: nothing is done.

    Args:
        losses: (B,) float32, without gradient.
        ids: (B,) int64 in 0..N-1; one that is there twice has two visits.
        memory: `BadPairMiner`'s buffers by name: ``kind``, ``loss_sum``, ``weight_sum`` (or None),
            ``visits`` and ``last_loss``, (N,) each, and ``mean`` and ``std``.
        weighting: as for `pair_weights`.
        record: whether to record the losses.
        visit_weight: of each visit, where ``weight_sum`` is there.

    Returns:
        (B,) weights.
    """
    values, places = losses.numpy(), ids.numpy()
    kinds = _array(memory, "kind").take(places)
    mean, std = float(_tensor(memory, "mean")), float(_tensor(memory, "std"))
    with np.errstate(all="ignore"):
        # One number is finite where all of them are (or it overflows, which does no harm).
        if not math.isfinite(values.dot(values)):
            return None
        weights = _weights(values, kinds, mean, std, weighting)
    if record:
        if memory["weight_sum"] is None:
            np.add.at(_array(memory, "loss_sum"), places, values)
        else:
            weight = np.full(len(places), visit_weight, np.float32)
            np.add.at(_array(memory, "loss_sum"), places, values * weight)
            np.add.at(_array(memory, "weight_sum"), places, weight)
        np.add.at(_array(memory, "visits"), places, _ones(len(places)))
        last = _array(memory, "last_loss")
        last[places] = values
        # Where an id comes twice with two losses, one of them is not what stands there now: then
        # the last visit's is written.
        if not (last.take(places) == values).all():
            once, position = np.unique(places[::-1], return_index=True)
            last[once] = values[::-1][position]
    return torch.from_numpy(weights)


@functools.lru_cache(maxsize=2)  # of the usual batch and an epoch's last
def _ones(count: int) -> npt.NDArray[np.int32]:
    return np.ones(count, np.int32)


def _tensor(memory: Mapping[str, Tensor | None], name: str) -> Tensor:
    tensor = memory[name]
    assert tensor is not None  # weight_sum alone may be missing, and is asked for where it is not
    return tensor


def _array(memory: Mapping[str, Tensor | None], name: str) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = _tensor(memory, name).numpy()
    return array


def _weights(
    values: npt.NDArray[Any],
    kinds: npt.NDArray[Any],
    mean: float,
    std: float,
    weighting: Weighting,
) -> npt.NDArray[Any]:
    """Return the weights of finite losses."""
    number = values.dtype.type
    weights = np.ones_like(values)
    flagged = kinds.nonzero()[0]  # CLEAN is 0
    if len(flagged) and std > 0:
        of_flagged = values[flagged]
        exponents = (of_flagged - number(mean)) / number(std)
        exponents *= exponents
        exponents *= number(-0.5)
        # NumPy's exponential function differs from torch's in the last bit.
        found = torch.from_numpy(exponents).exp_().numpy()
        if weighting == "density":
            found /= number(std * math.sqrt(2.0 * math.pi))
        np.maximum(found, np.finfo(number).tiny, out=found)
        weights[flagged] = found
    return weights
