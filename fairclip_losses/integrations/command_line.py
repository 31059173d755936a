"""The command line of a hooked host: its own arguments, and ours taken out of them."""

from __future__ import annotations

import argparse
import difflib
import io
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import UsageError
from .events import default_registry
from .flags import build_parser, split_flags
from .hooked import HookedArgs
from .runs import Run


def parse_arguments(parse: Callable[[list[str]], argparse.Namespace], argv: Sequence[str]) -> Any:
    """Return the host's arguments: its own object where nothing was asked, `HookedArgs` otherwise.

    Raises:
        UsageError: what one of the two parsers, or the making of a callback, refuses.
    """
    if any(word in ("-h", "--help") for word in argv):
        print("usage: python -m fairclip_losses.train [open_clip's flags] [--fair-loss ...]\n")
        print(build_parser().format_help())
        print("open_clip's own flags, unchanged:\n")
        return parse(list(argv))
    options, rest = split_flags(argv)
    args = _parse_quietly(parse, rest)
    if not (options.active or len(default_registry)):
        return args
    hooked = HookedArgs(**vars(args))
    if options.active:
        vars(hooked).update(vars(options))
    hooked.run = Run(options, hooked)
    return hooked


def _parse_quietly(parse: Callable[[list[str]], Any], argv: list[str]) -> Any:
    """Call the host's parser; what it refuses is its one line, without the pages of usage."""
    with _captured_stderr() as captured:
        try:
            args = parse(argv)
        except SystemExit as stop:
            if not stop.code:
                raise
            message = captured.getvalue().strip().rpartition("error: ")[2]
            raise UsageError(f"{message}{_suggestion(message)}") from None
    sys.stderr.write(captured.getvalue())
    return args


class _OwnThread(io.StringIO):
    """Keeps what this thread writes, and hands on what others write meanwhile."""

    def __init__(self, others: Any) -> None:
        super().__init__()
        self._others = others
        self._owner = threading.get_ident()

    def write(self, text: str) -> int:
        """Write to the buffer, or for another thread where it would have gone."""
        if threading.get_ident() == self._owner:
            return super().write(text)
        return int(self._others.write(text))


_stderr_lock = threading.RLock()


@contextmanager
def _captured_stderr() -> Iterator[io.StringIO]:
    """Capture what the block writes to stderr; one thread at a time, for stderr is everyone's."""
    with _stderr_lock:
        before = sys.stderr
        captured = _OwnThread(before)
        sys.stderr = captured
        try:
            yield captured
        finally:
            sys.stderr = before


def _suggestion(message: str) -> str:
    """Return a hint where a flag of ours is misspelt."""
    ours = [flag for action in build_parser()._actions for flag in action.option_strings]
    for word in re.findall(r"--fair[\w-]*", message):
        close = difflib.get_close_matches(word, ours, n=1)
        if close:
            return f" (did you mean {close[0]}?)"
    return ""
