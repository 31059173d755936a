"""Replacing functions of a module or class and putting them back; knows nothing of what they do."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_BY_NAME = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Call:
    """An intercepted call: the original function, and what it was called with."""

    original: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    bound: inspect.BoundArguments

    def __getitem__(self, name: str) -> Any:
        """Return an argument by its name, or its default."""
        return self.bound.arguments[name]

    def proceed(self) -> Any:
        """Call the original function with the arguments as they are."""
        return self.original(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Hook:
    """What to run around a function of the module.

    ``around`` gets the call and returns what the caller shall see. Of the arguments it may read
    those named in ``reads``; where it reads none by name, the function is called with one by
    position.
    """

    name: str
    around: Callable[[Call], Any]
    reads: tuple[str, ...] = ()

    def missing(self, function: Callable[..., Any]) -> str:
        """Return what a function does not take of what the hook relies on, in words."""
        parameters = list(inspect.signature(function).parameters.values())
        if self.reads:
            names = [p.name for p in parameters if p.kind not in _VARIABLE]
            return ", ".join(name for name in self.reads if name not in names)
        lacks = not parameters or parameters[0].kind in _BY_NAME
        return "one argument by position" if lacks else ""


class ModulePatch:
    """The hooks of one module, or of one class.

    ``known`` names the module's package and the versions that have the hook points. A wrapper that
    somebody kept, or has wrapped in turn, passes calls through once it is no longer in force.
    """

    def __init__(self, module: ModuleType | type, hooks: tuple[Hook, ...], known: str) -> None:
        self.module = module
        self._hooks = hooks
        self._known = known
        self._wrappers: dict[str, Callable[..., Any]] = {}

    def install(self) -> bool:
        """Replace what is not replaced yet; return whether the patch was not in force before.

        Raises:
            ImportError: the module lacks a function, or a function a parameter, that is hooked;
                the message names the path looked for and the versions known to work.
        """
        self._check_hook_points()
        is_new = not self._wrappers
        for hook in self._hooks:
            current = getattr(self.module, hook.name)
            if current is not self._wrappers.get(hook.name):
                self._wrappers[hook.name] = wrapper = self._wrap(hook, current)
                setattr(self.module, hook.name, wrapper)
        return is_new

    def undo(self) -> None:
        """Put the originals back; what others have replaced since is left as it is."""
        for name, wrapper in self._wrappers.items():
            current = getattr(self.module, name, None)
            original = vars(wrapper)["__wrapped__"]
            if current is wrapper:
                setattr(self.module, name, original)
            elif current is not original:
                path = f"{self.module.__name__}.{name}"
                log.warning("%s was replaced after the patch and is left as it is", path)
        self._wrappers.clear()

    def _wrap(self, hook: Hook, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._wrappers.get(hook.name) is not wrapper:
                return original(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return hook.around(Call(original, args, kwargs, bound))

        return wrapper

    def _check_hook_points(self) -> None:
        for hook in self._hooks:
            path = f"{self.module.__name__}.{hook.name}"
            function = getattr(self.module, hook.name, None)
            if not callable(function):
                lacks = f"{self.module.__name__} has no {hook.name}"
            elif missing := hook.missing(function):
                lacks = f"{path}{inspect.signature(function)} does not take {missing}"
            else:
                continue
            package, found = self._known.split()[0], ""
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found = f"; found: {importlib.metadata.version(package)}"
            raise ImportError(f"{lacks}; known to work: {self._known}{found}")
