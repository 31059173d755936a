"""Replacing functions of a host module, and putting them back; knows no particular host.

A `HostPatch` replaces functions by name in a module and keeps the originals. It is in force while
anyone holds it: a `with` block, a bare call that nobody has taken back, or a call of a hooked
function under way. Holds are counted under a lock, so threads may come and go; the last to leave
puts every symbol back. A replacement that somebody kept passes calls through from then on.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

_MARK = "__fairclip_original__"


@dataclass(frozen=True)
class HostCall:
    """A call of a host's function, intercepted: its arguments by name, and the function."""

    original: Callable[..., Any]
    bound: inspect.BoundArguments

    def __getitem__(self, name: str) -> Any:
        """Return an argument, or its default."""
        if name in self.bound.arguments:
            return self.bound.arguments[name]
        return self.bound.signature.parameters[name].default

    def proceed(self) -> Any:
        """Call the host's function with the arguments as they are."""
        return self.original(*self.bound.args, **self.bound.kwargs)


@dataclass(frozen=True)
class Hook:
    """What to run around a function of the host.

    ``around`` gets the call and returns what the host shall see. It may read the arguments named
    in ``parameters``; of a function with none, the host passes one argument by position.
    """

    name: str
    around: Callable[[HostCall], Any]
    parameters: tuple[str, ...] = ()


class HostPatch:
    """The hooks of one host module, and who holds them in force.

    ``known`` names the host's package and the versions that have the hook points.
    """

    def __init__(self, host: ModuleType, hooks: tuple[Hook, ...], known: str) -> None:
        self.host = host
        self._hooks = hooks
        self._known = known
        self._lock = threading.RLock()
        self._open = 0  # blocks and calls under way
        self._holders: list[object] = []  # those of `keep`
        self._originals: dict[str, Callable[..., Any]] = {}
        self._wrappers: dict[str, Callable[..., Any]] = {}

    def keep(self, holder: object) -> None:
        """Hold the patch for ``holder`` until `release`.

        Raises:
            ImportError: the host lacks a function, or a function a parameter, that is hooked; the
                message names the path looked for and the versions known to work.
        """
        with self._lock:
            self._install()
            self._holders.append(holder)

    def release(self, holder: object = None) -> None:
        """Give up the hold of one that `keep` noted, or of all of them."""
        with self._lock:
            self._holders = [h for h in self._holders if holder is not None and h is not holder]
            self._undo_if_unheld()

    def enter(self) -> None:
        """Hold the patch until the matching `leave`.

        Raises:
            ImportError: as `keep`.
        """
        with self._lock:
            self._install()
            self._open += 1

    def leave(self) -> None:
        """Give up one hold of `enter`."""
        with self._lock:
            self._open -= 1
            self._undo_if_unheld()

    def _install(self) -> None:
        _check_hook_points(self.host, self._hooks, self._known)
        for hook in self._hooks:
            current = getattr(self.host, hook.name)
            if current is self._wrappers.get(hook.name):
                continue
            while _is_hook(current):  # put back by others, or of another import of this package
                current = current.__wrapped__
            wrapper = self._wrap(hook, current)
            self._originals[hook.name], self._wrappers[hook.name] = current, wrapper
            setattr(self.host, hook.name, wrapper)

    def _undo_if_unheld(self) -> None:
        if self._open or self._holders:
            return
        for name, wrapper in self._wrappers.items():
            current = getattr(self.host, name, None)
            if current is wrapper:
                setattr(self.host, name, self._originals[name])
            elif current is not self._originals[name]:
                path = f"{self.host.__name__}.{name}"
                log.warning("%s was replaced after the patch and is left as it is", path)
        self._originals.clear()
        self._wrappers.clear()

    def _wrap(self, hook: Hook, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if (
                self._wrappers.get(hook.name) is not wrapper
            ):  # undone, or wrapped anew by `_install`
                return original(*args, **kwargs)
            self.enter()
            try:
                return hook.around(HostCall(original, signature.bind(*args, **kwargs)))
            finally:
                self.leave()

        setattr(wrapper, _MARK, original)
        return wrapper


def _is_hook(function: Any) -> bool:
    # functools.wraps hands our mark on to those who wrap ours; what they wrap is another function.
    original = getattr(function, _MARK, None)
    return original is not None and original is getattr(function, "__wrapped__", None)


def _check_hook_points(host: ModuleType, hooks: tuple[Hook, ...], known: str) -> None:
    for hook in hooks:
        path = f"{host.__name__}.{hook.name}"
        function = getattr(host, hook.name, None)
        if not callable(function):
            lacks = f"{host.__name__} has no {hook.name}"
        elif not _takes(function, hook.parameters):
            wanted = ", ".join(hook.parameters) or "one argument by position"
            lacks = f"{path}{inspect.signature(function)} does not take {wanted}"
        else:
            continue
        raise ImportError(f"{lacks}; known to work: {known}{_found(known.split()[0])}")


def _takes(function: Callable[..., Any], names: tuple[str, ...]) -> bool:
    parameters = inspect.signature(function).parameters
    if names:
        return parameters.keys() >= set(names)
    first = next(iter(parameters.values()), None)
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    return first is not None and first.kind not in by_name


def _found(package: str) -> str:
    try:
        return f"; found: {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return ""
