"""The command-line flags that fair training adds to open_clip's own."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any, NoReturn

from ..data.groups import given_labels
from ..errors import UsageError, one_line, usage_errors
from ..presets import PRESETS
from .events import Callback
from .fair_options import PARTS, FairOptions, check_options


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags added; it leaves the host's own flags alone."""
    parser = _OneLineParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    group = parser.add_argument_group("fair loss (fairclip_losses)")
    add = group.add_argument
    add(
        "--fair-loss",
        nargs="*",
        choices=PARTS,
        default=None,
        metavar="PART",
        help="train with bad pair mining (dbpm), the fairness term (sinkhorn), or, bare, both",
    )
    add(
        "--fair-preset",
        choices=sorted(PRESETS),
        help="consistent set of options: aligned (default), paper, or official (the published "
        "code's computation, for comparison only)",
    )
    add(
        "--fair-attributes",
        nargs="+",
        default=(),
        metavar="NAME[=LABEL,...[,*]]",
        help="protected attributes: columns of the training CSV, or keys of the json member of a "
        "webdataset sample; with labels after = only these are groups, and any other value is "
        "refused, or unknown where the labels end in ,*",
    )
    add("--fair-weight", type=float, metavar="LAMBDA", help="weight of the fairness term")
    add(
        "--fair-blur",
        type=float,
        metavar="BLUR",
        help="length scale of the Sinkhorn divergence; 0 = exact distance",
    )
    add("--fair-p", type=int, choices=(1, 2), help="power of the distance's cost")
    add(
        "--fair-score",
        choices=("loss", "similarity", "official"),
        help="what the fairness term compares between groups",
    )
    add(
        "--fair-warmup-epochs",
        type=int,
        metavar="N",
        help="epochs before the first pairs are flagged",
    )
    add(
        "--fair-noisy-sigma",
        type=float,
        metavar="BETA",
        help="flag pairs whose loss history lies this many std below the mean (inf = never)",
    )
    add(
        "--fair-faulty-sigma",
        type=float,
        metavar="BETA",
        help="flag pairs whose loss history lies this many std above the mean (inf = never)",
    )
    add(
        "--fair-queue",
        type=int,
        metavar="K",
        help="recent scores of each group that widen its distribution beyond the batch",
    )
    add(
        "--fair-id-key",
        metavar="NAME",
        help="column of unique integer pair ids, or key of the json member (default: the row "
        "number, or a hash of the sample's key and shard)",
    )
    add(
        "--fair-eval-label",
        metavar="NAME",
        help="label column of --val-data: evaluate fairness zero-shot after each evaluation",
    )
    add(
        "--fair-eval-prompts",
        nargs="+",
        default=(),
        metavar="PROMPT",
        help="one prompt per class of the label, in the order of the sorted classes",
    )
    add(
        "--fair-callback",
        action="append",
        default=[],
        metavar="MODULE:NAME",
        help="a callback of your own (class or instance); may be given several times",
    )
    add(
        "--fair-shard-memory",
        action="store_true",
        help="spread the miner's memory over the processes (owner = id modulo their number); "
        "without it each keeps the whole",
    )
    add(
        "--fair-save-pairs",
        action="store_true",
        help="write every pair's history after each epoch, not only the flagged ones",
    )
    add(
        "--fair-fresh-state",
        nargs="*",
        metavar="CALLBACK",
        help="resume with the callbacks' state (the miner's memory) empty, of all or of those "
        "named, whatever was saved with the checkpoint",
    )
    return parser  # fmt: skip


def split_flags(argv: Sequence[str]) -> tuple[FairOptions, list[str]]:
    """Return the fair options and the arguments that are the host's.

    Raises:
        UsageError: a value that a flag does not take, or flags that contradict each other.
    """
    parsed, rest = build_parser().parse_known_args(list(argv))
    if parsed.fair_loss is not None:
        # In one order, each once: a resumed run is compared by it.
        parsed.fair_loss = [part for part in PARTS if part in (parsed.fair_loss or PARTS)]
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parsed).items()
    }
    values["fair_loss"] = values["fair_loss"] or ()
    named = [item.partition("=") for item in values["fair_attributes"]]
    values["fair_attributes"] = tuple(name for name, _, _ in named)
    with usage_errors():
        given = {
            name: given_labels(labels, f"--fair-attributes {name}={labels}")
            for name, sign, labels in named
            if sign
        }
    values["fair_labels"] = {name: labels for name, (labels, _) in given.items()}
    values["fair_others_unknown"] = tuple(name for name, (_, others) in given.items() if others)
    options = FairOptions(**values)
    check_options(options)
    return options, rest


def load_callback(spec: str) -> Callback:
    """Import ``module:name`` and return the callback; a class is called without arguments.

    Raises:
        UsageError: the spec is malformed, cannot be imported, or is no `Callback`.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise UsageError(f"--fair-callback expects MODULE:NAME, got {spec!r}")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise UsageError(f"--fair-callback {spec} cannot be imported: {one_line(error)}") from error
    try:
        callback = found() if isinstance(found, type) else found
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"--fair-callback {spec} cannot be made without arguments: {one_line(error)}"
        ) from error
    if not isinstance(callback, Callback):
        raise UsageError(
            f"--fair-callback {spec} must be a fairclip_losses Callback, "
            f"got {type(callback).__name__}"
        )
    return callback
