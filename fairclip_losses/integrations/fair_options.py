"""What the ``--fair-*`` flags say, and which of them go together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import UsageError
from ..presets import PRESETS
from .events import default_registry

PARTS = ("dbpm", "sinkhorn")

_OPTIONS_OF = {
    "dbpm": ("fair_warmup_epochs", "fair_noisy_sigma", "fair_faulty_sigma",
             "fair_shard_memory", "fair_save_pairs"),
    "sinkhorn": ("fair_weight", "fair_blur", "fair_p", "fair_score", "fair_queue"),
}  # fmt: skip
_OPTIONS_OF_BOTH = ("fair_preset", "fair_id_key")


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
    fair_warmup_epochs: int | None
    fair_noisy_sigma: float | None
    fair_faulty_sigma: float | None
    fair_queue: int | None
    fair_id_key: str | None
    fair_shard_memory: bool
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
        evaluated = self.fair_eval_label is not None
        return bool(self.fair_loss or self.fair_callback or evaluated)


def check_options(options: FairOptions) -> None:
    """Refuse values out of range, and flags that contradict each other.

    Raises:
        UsageError: the message names the flag and says what to change.
    """
    _check_values(options)
    _check_parts(options)
    _check_combination(options)


def _check_values(options: FairOptions) -> None:
    for name in ("fair_weight", "fair_blur", "fair_noisy_sigma", "fair_faulty_sigma",
                 "fair_warmup_epochs", "fair_queue"):  # fmt: skip
        value = getattr(options, name)
        finite = not name.endswith("sigma")  # an infinite sigma flags no pair
        if value is not None and not (value >= 0 and (value < math.inf or not finite)):
            kind = "a finite number" if finite else "a number"
            raise UsageError(f"{_flag(name)} must be {kind} >= 0, got {value}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_given(options: FairOptions, name: str) -> bool:
    value = getattr(options, name)
    return value is not None and value is not False


def _check_parts(options: FairOptions) -> None:
    """Refuse an option of a part that does not train: it would be without effect."""
    if not options.fair_loss:
        for name in (*_OPTIONS_OF_BOTH, *itertools.chain(*_OPTIONS_OF.values())):
            if _is_given(options, name):
                flag = _flag(name)
                raise UsageError(f"{flag} has no effect without --fair-loss; add it or drop {flag}")
        return
    for part, names in _OPTIONS_OF.items():
        for name in names:
            if part not in options.fair_loss and _is_given(options, name):
                raise UsageError(
                    f"{_flag(name)} needs --fair-loss {part}, whose option it is, got --fair-loss "
                    f"{' '.join(options.fair_loss)}; add {part} or drop {_flag(name)}"
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
