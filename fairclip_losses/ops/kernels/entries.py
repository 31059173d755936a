"""The entries of a plan that carry its mass, found in one pass over a streamed kernel."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .dense import LOG2_E
from .streamed import StreamedKernel


def large_entries(
    kernel: StreamedKernel, epsilon: float, f: Tensor, g: Tensor, depth: float, most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]] | None:  # fmt: skip
    """Return i, j and C_ij where ``exp((f_i + g_j - C_ij) / eps)`` is above ``exp(-depth)``.

    For one row whose g answers f: those left out carry less than ``exp(-depth)`` of its mass.
    What is as large beside the largest one of its row is in too. None if they are many more
    than ``most``.
    """
    scale, found, count, m = LOG2_E / epsilon, [], 0, kernel.y.shape[-2]
    for _, exponents in kernel.exponents(epsilon, scale * f, scale * g, f.shape[:-1], whole=True):
        rows = max(exponents.size // m, 1)
        for start in range(0, len(f), rows):
            points = slice(start, min(start + rows, len(f)))
            for _, exponent, _ in exponents.walk(points, slice(0, m)):
                least = exponent.amax(-1, keepdim=True).clamp_(max=0.0) - LOG2_E * depth
                i, j = (exponent > least).nonzero(as_tuple=True)
                count += len(i)
                if count * len(f) > 2 * most * points.stop:  # nor will it be
                    return None
                cost = f[points][i] + g[j] - exponent[i, j] / scale
                found.append((i + start, j, cost))
    every = [torch.cat(parts).numpy() for parts in zip(*found, strict=True)]
    return every[0], every[1], every[2]
