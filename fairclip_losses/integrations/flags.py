"""The command-line flags that fair training adds to open_clip's own, and which go together."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..data.groups import given_attributes
from ..errors import UsageError, one_line, usage_errors
from ..presets import PRESETS
from .events import Callback, default_registry

PARTS = ("dbpm", "sinkhorn")
_DBPM, _SINKHORN = PARTS[:1], PARTS[1:]

_SEVERAL: dict[str, Any] = {"nargs": "+", "default": ()}
# Each flag with the parts of the loss of which it is an option, argparse's arguments and its help.
_FLAGS: tuple[tuple[str, tuple[str, ...], dict[str, Any], str], ...] = (
    ("--fair-loss", (), {"nargs": "*", "choices": PARTS, "metavar": "PART"},
     "train with bad pair mining (dbpm), the fairness term (sinkhorn), or, bare, both"),
    ("--fair-preset", PARTS, {"choices": sorted(PRESETS)},
     "consistent set of options: aligned (default), paper, or official (the published code's "
     "computation, for comparison only)"),
    ("--fair-attributes", (), {**_SEVERAL, "metavar": "NAME[=LABEL,...[,*]]"},
     "protected attributes: columns of the training CSV, or keys of the json member of a "
     "webdataset sample; with labels after = only these are groups, -1 too where it is listed, and "
     "any other value is refused, or unknown where the labels end in ,*"),
    ("--fair-weight", _SINKHORN, {"type": float, "metavar": "LAMBDA"},
     "weight of the fairness term"),
    ("--fair-blur", _SINKHORN, {"type": float, "metavar": "BLUR"},
     "length scale of the Sinkhorn divergence; 0 = exact distance"),
    ("--fair-p", _SINKHORN, {"type": int, "choices": (1, 2)}, "power of the distance's cost"),
    ("--fair-score", _SINKHORN, {"choices": ("loss", "similarity", "official")},
     "what the fairness term compares between groups"),
    ("--fair-start-epoch", _SINKHORN, {"type": int, "metavar": "N"},
     "epochs before the fairness term trains; it is measured from the start"),
    ("--fair-weighting", _DBPM, {"choices": ("relative", "density", "posterior")},
     "weight of a bad pair: a Gaussian at its loss where it is flagged by the thresholds below "
     "(relative, or density as published), or its posterior of being clean by a mixture"),
    ("--fair-warmup-epochs", _DBPM, {"type": int, "metavar": "N"},
     "epochs before the first pairs are flagged"),
    ("--fair-noisy-sigma", _DBPM, {"type": float, "metavar": "BETA"},
     "flag pairs whose loss history lies this many std below the mean (inf = never)"),
    ("--fair-faulty-sigma", _DBPM, {"type": float, "metavar": "BETA"},
     "flag pairs whose loss history lies this many std above the mean (inf = never)"),
    ("--fair-queue", _SINKHORN, {"type": int, "metavar": "K"},
     "recent scores of each group that widen its distribution beyond the batch"),
    ("--fair-id-key", PARTS, {"metavar": "NAME"},
     "column of unique integer pair ids, or key of the json member (default: the row number, or a "
     "hash of the sample's key and shard)"),
    ("--fair-eval-label", (), {"metavar": "NAME"},
     "label column of --val-data: evaluate fairness zero-shot after each evaluation"),
    ("--fair-eval-prompts", (), {**_SEVERAL, "metavar": "PROMPT"},
     "one prompt per class of the label, in the order of the sorted classes"),
    ("--fair-callback", (), {"action": "append", "default": [], "metavar": "MODULE:NAME"},
     "a callback of your own (class or instance); may be given several times"),
    ("--fair-save-pairs", _DBPM, {"action": "store_true"},
     "write every pair's history after each epoch, not only the flagged ones"),
    ("--fair-fresh-state", (), {"nargs": "*", "metavar": "CALLBACK"},
     "resume with the callbacks' state (the miner's memory) empty, of all or of those named, "
     "whatever was saved with the checkpoint"),
)  # fmt: skip


@dataclass(frozen=True)
class FairOptions:
    """The parsed ``--fair-*`` flags; None is "as the preset says"."""

    fair_loss: tuple[str, ...]
    fair_preset: str | None
    fair_attributes: tuple[str, ...]
    fair_weight: float | None
    fair_blur: float | None
    fair_p: int | None
    fair_score: str | None
    fair_start_epoch: int | None
    fair_weighting: str | None
    fair_warmup_epochs: int | None
    fair_noisy_sigma: float | None
    fair_faulty_sigma: float | None
    fair_queue: int | None
    fair_id_key: str | None
    fair_eval_label: str | None
    fair_eval_prompts: tuple[str, ...]
    fair_callback: tuple[str, ...]
    fair_save_pairs: bool
    fair_fresh_state: tuple[str, ...] | None  # () = of all
    fair_labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fair_others_unknown: tuple[str, ...] = ()  # attributes whose labels end in ,*

    @property
    def active(self) -> bool:
        """Whether anything at all was asked for beyond upstream's training."""
        return bool(self.fair_loss or self.fair_callback or self.fair_eval_label is not None)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags added; it leaves open_clip's own flags alone."""
    parser = _OneLineParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    group = parser.add_argument_group("fair loss (fairclip_losses)")
    for flag, _, kind, text in _FLAGS:
        group.add_argument(flag, **kind, help=text)
    return parser


def split_flags(argv: Sequence[str]) -> tuple[FairOptions, list[str]]:
    """Return the fair options and the arguments that are open_clip's.

    Raises:
        UsageError: a value that a flag does not take, or flags that contradict each other.
    """
    parsed, rest = build_parser().parse_known_args(list(argv))
    given = vars(parsed).items()
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given}
    if (parts := values["fair_loss"]) is not None:
        # In one order, each once: a resumed run is compared by it.
        parts = tuple(part for part in PARTS if part in (parts or PARTS))
    values["fair_loss"] = parts or ()
    with usage_errors():
        names, labels, others = given_attributes(values["fair_attributes"], "--fair-attributes")
    values |= {"fair_attributes": names, "fair_labels": labels, "fair_others_unknown": others}
    options = FairOptions(**values)
    _check_values(options)
    _check_parts(options)
    _check_combination(options)
    return options, rest


def _check_values(options: FairOptions) -> None:
    for name, value in vars(options).items():
        finite = not name.endswith("sigma")  # an infinite sigma flags no pair
        is_number = isinstance(value, (int, float))
        if is_number and not (value >= 0 and (value < math.inf or not finite)):
            kind = "a finite number" if finite else "a number"
            raise UsageError(f"--{name.replace('_', '-')} must be {kind} >= 0, got {value}")


def _check_parts(options: FairOptions) -> None:
    """Refuse an option of a part that does not train: it would be without effect."""
    for flag, parts, *_ in _FLAGS:
        value = getattr(options, flag[2:].replace("-", "_"))
        if not parts or value is None or value is False or set(parts) & set(options.fair_loss):
            continue
        if not options.fair_loss:
            raise UsageError(f"{flag} has no effect without --fair-loss; add it or drop {flag}")
        raise UsageError(
            f"{flag} needs --fair-loss {parts[0]}, whose option it is, got --fair-loss "
            f"{' '.join(options.fair_loss)}; add {parts[0]} or drop {flag}"
        )
    if options.fair_save_pairs and PRESETS[options.fair_preset or "aligned"].mining_unit != "pair":
        raise UsageError(
            "--fair-save-pairs needs a history of each pair, and --fair-preset "
            f"{options.fair_preset} keeps none; drop one of the two"
        )


def _check_combination(options: FairOptions) -> None:
    keepers = options.fair_loss or options.fair_callback or len(default_registry)
    if options.fair_fresh_state is not None and not keepers:
        raise UsageError("--fair-fresh-state has no effect without --fair-loss or --fair-callback")
    if options.fair_attributes and not options.active:
        raise UsageError(
            "--fair-attributes has no effect without --fair-loss, --fair-eval-label or "
            "--fair-callback; add one"
        )
    if "sinkhorn" in options.fair_loss and not options.fair_attributes:
        raise UsageError(
            "--fair-loss sinkhorn needs --fair-attributes NAME... (columns of the training CSV, or "
            "keys of the json member); --fair-loss dbpm goes without"
        )
    if len(set(options.fair_attributes)) != len(options.fair_attributes):
        raise UsageError(f"--fair-attributes names an attribute twice: {options.fair_attributes}")
    if (options.fair_eval_label is None) != (not options.fair_eval_prompts):
        raise UsageError("--fair-eval-label and --fair-eval-prompts go together")
    if options.fair_eval_label is not None and not options.fair_attributes:
        raise UsageError("--fair-eval-label needs --fair-attributes NAME...")


def load_callback(spec: str) -> Callback:
    """Import ``module:name`` and return the callback; a class is called without arguments.

    Raises:
        UsageError: the spec is malformed, cannot be imported, or is no `Callback`.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise UsageError(f"--fair-callback expects MODULE:NAME, got {spec!r}")
    done = "imported"
    try:
        found = getattr(importlib.import_module(module_name), name)
        done = "made without arguments"
        callback = found() if isinstance(found, type) else found
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UsageError(f"--fair-callback {spec} cannot be {done}: {one_line(error)}") from error
    if not isinstance(callback, Callback):
        raise UsageError(
            f"--fair-callback {spec} must be a fairclip_losses Callback, "
            f"got {type(callback).__name__}"
        )
    return callback
