"""Errors that the command lines show as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """Something that the user can put right; the message says what was expected and what came."""


class CallbackError(RuntimeError):
    """A training callback failed; the message names the callback and the event."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a ValueError of the block, which says what is wrong with the input, into UsageError."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error
