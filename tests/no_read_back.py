"""An accelerator's way on the CPU, and a watch over operations that would wait for one."""

from __future__ import annotations

from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode


def as_on_an_accelerator():
    """Let nothing look at a value: `validation.is_readable` is false."""
    return mock.patch("fairclip_losses.validation.READABLE_DEVICES", frozenset())


class NoReadBack(TorchDispatchMode):
    """Fails where a value would have to come back from the device; runs what runs on one."""

    FORBIDDEN = (
        *("_local_scalar_dense", "nonzero", "item", "is_nonzero"),
        *("masked_select", "equal", "unique"),
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self._elsewhere = as_on_an_accelerator()
        self._elsewhere.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._elsewhere.stop()
        return super().__exit__(*error)
