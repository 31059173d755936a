"""Errors that the command lines show as one line."""

from __future__ import annotations


class UsageError(ValueError):
    """Something that the user can put right; the message says what was expected and what came."""


class CallbackError(RuntimeError):
    """A training callback failed; the message names the callback and the event."""
