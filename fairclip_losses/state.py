"""State of a module: tensors that are saved with it, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_NO_FLOAT64 = frozenset({"mps"})  # types of devices

ModuleT = TypeVar("ModuleT", bound="StatefulModule")


def has_float64(device: torch.device) -> bool:
    """Whether a device knows float64; state of float64 is float32 on one that does not."""
    return device.type not in _NO_FLOAT64


class StatefulModule(nn.Module):
    """A module with state: tensors that ``state_dict`` holds and that follow it to a device.

    State is no buffer, for two things that happen to the buffers of a model must not happen to it:
    casts (``.half()``, ``.to(dtype)``, ``.double()``) would round it, and DistributedDataParallel
    would send the first process's to all others before every step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._state_dtypes: dict[str, torch.dtype] = {}
        self._unsaved_state: set[str] = set()

    def register_state(self, name: str, value: Tensor, *, saved: bool = True) -> None:
        """Add a tensor under a name, of its dtype for good; like a buffer, it can be replaced."""
        self._state_dtypes[name] = value.dtype
        if not saved:
            self._unsaved_state.add(name)
        setattr(self, name, value)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {name: getattr(self, name) for name in self._state_dtypes}

    def _apply(self: ModuleT, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ModuleT:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in self.state().items():
            device = fn(value.new_empty(0)).device  # all that is taken from what `fn` does
            dtype = self._state_dtypes[name]
            if dtype == torch.float64 and not has_float64(device):
                dtype = torch.float32
            setattr(self, name, value.to(device, dtype))
        return self

    @contextmanager
    def _state_as_buffers(self) -> Iterator[None]:
        """Have torch save and load the state as it does buffers."""
        self._buffers.update(self.state())
        self._non_persistent_buffers_set.update(self._unsaved_state)
        try:
            yield
        finally:
            for name in self._state_dtypes:
                vars(self)[name] = self._buffers.pop(name)
            self._non_persistent_buffers_set.difference_update(self._unsaved_state)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with self._state_as_buffers():
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        with self._state_as_buffers():
            super()._load_from_state_dict(state_dict, prefix, *others)
        self._apply(lambda tensor: tensor, recurse=False)  # the dtypes, which assign=True replaces
