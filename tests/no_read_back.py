"""An accelerator's way on the CPU, and a watch over operations that would wait for one."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def as_on_an_accelerator():
    """Let nothing look at a value: `validation.is_readable` is false."""
    return mock.patch("fairclip_losses.validation.READABLE_DEVICES", frozenset())


class NoReadBack(TorchDispatchMode):
    """Fails where a value would have to come back from the device; runs what runs on one.

    It counts the calls of each operation and notes the most entries that one makes.
    """

    FORBIDDEN = (
        *("_local_scalar_dense", "nonzero", "item", "is_nonzero"),
        *("masked_select", "equal", "unique", "_unique2"),
    )

    def __init__(self):
        super().__init__()
        self.calls, self.largest = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert name not in self.FORBIDDEN and not masked, f"{name} waits for the device"
        result = func(*args, **(kwargs or {}))
        self.calls[name] += 1
        # An operation in place returns its buffer: that is no new memory.
        if isinstance(result, torch.Tensor) and not name.endswith("_"):
            self.largest = max(self.largest, result.numel())
        return result

    def __enter__(self):
        self._elsewhere = as_on_an_accelerator()
        self._elsewhere.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._elsewhere.stop()
        return super().__exit__(*error)
