"""A watch over operations that would make the host wait for the device."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class NoReadBack(TorchDispatchMode):
    """Fails where a value would have to come back from the device."""

    FORBIDDEN = (
        *("_local_scalar_dense", "nonzero", "item", "is_nonzero"),
        *("masked_select", "equal", "unique"),
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))
