"""Text files written whole or not at all, and why a file could not be read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["reason", "write_text"]


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file that appears whole or not at all, with the folders it needs.

    The text goes to a temporary file in the same folder, which then takes the place of `path`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        # mkstemp makes a private file; give this one the rights that an ordinary new file gets.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def reason(error: Exception) -> str:
    """Say in one line why a file could not be read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0]
