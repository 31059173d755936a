"""``python -m fairclip_losses.train``: open_clip's training program with ``--fair-loss``.

All of open_clip's flags, unchanged, and those of `fairclip_losses.integrations.flags`. Without
``--fair-loss`` the run is plain upstream training.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence

from .errors import CallbackError, UsageError, one_line

_PROGRAM = "fairclip_losses.train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training program; return its exit status (0 good, 1 failed, 2 wrong usage)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        from .integrations.open_clip import check_flags, run_training

        check_flags(arguments)
        return run_training(arguments)
    except UsageError as error:
        return _report(error, 2, arguments)
    except CallbackError as error:
        return _report(error.__cause__, 1, arguments, str(error))
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _report(error, 1, arguments, one_line(error))
    finally:
        _quieten_torch()


def _report(
    error: BaseException | None, status: int, arguments: Sequence[str], message: str | None = None
) -> int:
    """Print one line on stderr; the traceback goes to the run's log file, or follows --debug."""
    text = " ".join((message or str(error)).split())
    print(f"{_PROGRAM}: error: {text}", file=sys.stderr)
    if error is not None:
        details = "".join(traceback.format_exception(error))
        if "--debug" in arguments:
            print(details, file=sys.stderr)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler) and handler.stream is not None:
                handler.stream.write(details)
                handler.flush()
    return status


def _quieten_torch() -> None:
    """Keep torch's statistics at exit from following the last line.

    open_clip's logging lets every logger there is speak at the level of its own.
    """
    for name in logging.getLogger().manager.loggerDict:
        if name.split(".")[0] == "torch":
            logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
