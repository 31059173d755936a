"""The kernels that the methods take, by what they are between."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from .dense import DenseKernel
from .line import LaplaceLine
from .streamed import StreamedKernel

if TYPE_CHECKING:
    from .triton_kernel import TritonKernel  # Triton is not everywhere

SpaceKernel: TypeAlias = "DenseKernel | StreamedKernel | TritonKernel"
Kernel: TypeAlias = "SpaceKernel | LaplaceLine"
