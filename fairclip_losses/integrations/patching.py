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
    """A call of a host's function, intercepted: the function, and what it was called with."""

    original: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    bound: inspect.BoundArguments

    def __getitem__(self, name: str) -> Any:
        """Return an argument by its name, or its default."""
        if name in self.bound.arguments:
            return self.bound.arguments[name]
        return self.bound.signature.parameters[name].default

    def proceed(self) -> Any:
        """Call the host's function with the arguments as they are."""
        return self.original(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Hook:
    """What to run around a function of the host.

    ``around`` gets the call and returns what the host shall see. Of the arguments it may read those
    named in ``reads``; where it reads none by name, the host passes one by position. ``known`` are
    the parameters of the known versions, in order: they tell the arguments of a function that
    somebody has wrapped in ``(*args, **kwargs)``.
    """

    name: str
    around: Callable[[HostCall], Any]
    reads: tuple[str, ...] = ()
    known: tuple[str, ...] = ()

    def signature_of(self, function: Callable[..., Any]) -> inspect.Signature:
        """Return by which signature to read the arguments of a call."""
        signature = inspect.signature(function)
        if not self.known or [p.kind for p in signature.parameters.values()] != [
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        ]:
            return signature
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        named = [inspect.Parameter(name, kind, default=None) for name in self.known]
        return inspect.Signature([*named, *list(signature.parameters.values())[1:]])

    def missing(self, function: Callable[..., Any]) -> str:
        """Return what a function does not take of what the hook relies on, in words."""
        parameters = self.signature_of(function).parameters.values()
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if self.reads:
            names = [p.name for p in parameters if p.kind not in variable]
            return ", ".join(name for name in self.reads if name not in names)
        first = next(iter(parameters), None)
        by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
        return "one argument by position" if first is None or first.kind in by_name else ""


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

    def _enter_call(self, name: str, wrapper: Callable[..., Any]) -> bool:
        """Hold the patch for a call, unless it was undone or has wrapped the function anew.

        A call installs nothing: what others have put over the hooks meanwhile stays over them.
        """
        with self._lock:
            in_force = self._wrappers.get(name) is wrapper
            self._open += in_force
            return in_force

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
        signature = hook.signature_of(original)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not self._enter_call(hook.name, wrapper):
                return original(*args, **kwargs)
            try:
                bound = signature.bind(*args, **kwargs)
                return hook.around(HostCall(original, args, kwargs, bound))
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
        elif missing := hook.missing(function):
            lacks = f"{path}{inspect.signature(function)} does not take {missing}"
        else:
            continue
        raise ImportError(f"{lacks}; known to work: {known}{_found(known.split()[0])}")


def _found(package: str) -> str:
    try:
        return f"; found: {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return ""
