"""Errors that the command lines show as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """Something that the user can put right; the message says what was expected and what came."""


class CallbackError(RuntimeError):
    """A training callback failed; the message names the callback and the event."""


def reason(error: BaseException) -> str:
    """Return what an error says as one line, without the file's name.

    Of an error that a loader's worker process passed on as a whole traceback it is the last line.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Caught "):
        return lines[-1].removeprefix("ValueError: ")
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """Return `reason` with the file's name, or the error's type where that helps to understand."""
    text, name = reason(error), type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {text}" if error.filename else text
    plain = isinstance(error, ValueError) or text == name or str(error).startswith("Caught ")
    return text if plain else f"{name}: {text}"


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a ValueError of the block, which says what is wrong with the input, into UsageError."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error
