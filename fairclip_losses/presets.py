"""Presets: consistent sets of options for mining and the fairness term."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .functional import Normalization
from .losses import FairLoss, MiningUnit, Score, SinkhornFairnessLoss
from .miners import BadPairMiner
from .validation import check_integer


@dataclass(frozen=True)
class Preset:
    """One set of options; see `BadPairMiner`, `SinkhornFairnessLoss` and `FairLoss`.

    What a preset does not say is as the three have it by default.
    """

    description: str
    fairness_weight: float = 0.1
    miner: Mapping[str, Any] = field(default_factory=dict)
    fairness: Mapping[str, Any] = field(default_factory=dict)
    warmup_share: float = 0.0  # of the epochs, where their number is known; at least one epoch
    score: Score = "loss"
    normalization: Normalization = "batch"
    mining_unit: MiningUnit = "pair"


_PUBLISHED_MINER = {"noisy_sigma": 3.0, "faulty_sigma": 3.0, "weighting": "density"}
_PUBLISHED_FAIRNESS = {"p": 2, "blur": 1e-4, "group_reduction": "sum"}

PRESETS: dict[str, Preset] = {
    "aligned": Preset(
        "this package's default: groups out of the batch, exact distance between per-pair losses, "
        "memory by pair id, bounded weights",
        warmup_share=1 / 7,
    ),
    "paper": Preset(
        "the paper's formulas and published constants, on correct pair ids",
        fairness_weight=1e-7,
        miner=_PUBLISHED_MINER,
        fairness=_PUBLISHED_FAIRNESS,
    ),
    "official": Preset(
        "what the published code computes, defects included, with the groups taken from the batch "
        "instead of from further forward passes; for comparison only",
        fairness_weight=1e-7,
        miner={**_PUBLISHED_MINER, "record": "weighted"},
        fairness={
            **_PUBLISHED_FAIRNESS,
            "detach": "groups",
            "divide_by_group_sum": True,
            "min_group_size": 1,
        },
        score="official",
        mining_unit="batch",
    ),
}


def build_fair_loss(
    base_loss: nn.Module,
    *,
    preset: str = "aligned",
    mining: bool = True,
    fairness: bool = True,
    num_pairs: int | None = None,
    total_epochs: int | None = None,
    num_groups: int | Sequence[int] | Mapping[str, int] | None = None,
    miner_options: Mapping[str, Any] | None = None,
    fairness_options: Mapping[str, Any] | None = None,
    fairness_weight: float | None = None,
    fairness_start: int | None = None,
    score: Score | None = None,
) -> FairLoss:
    """Return a `FairLoss` set up by a preset, with single options put on top.

    Args:
        base_loss: the loss to wrap.
        preset: ``"aligned"``, ``"paper"`` or ``"official"``.
        mining: whether to use a `BadPairMiner`.
        fairness: whether to use a `SinkhornFairnessLoss`.
        num_pairs: size of the training set if ids are row numbers, None for any int64 ids.
        total_epochs: length of the training; ``aligned`` flags its first pairs after a seventh of
            it, and after one epoch where it is not known.
        num_groups: see `SinkhornFairnessLoss`.
        miner_options: keyword arguments of the miner that replace the preset's; a weighting brings
            its detector, ``"mixture"`` for ``"posterior"``, else ``"threshold"``.
        fairness_options: keyword arguments of the fairness term that replace the preset's.
        fairness_weight: replaces the preset's where not None.
        fairness_start: as of `FairLoss`; None is 0.
        score: replaces the preset's where not None.

    Raises:
        ValueError: an unknown preset, an option that a part does not have, an option of a part that
            is left out (what describes the data, ``num_pairs`` and the like, may be given all the
            same), or what the parts refuse.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
    chosen = PRESETS[preset]
    miner = term = None
    _check_options("miner_options", miner_options, BadPairMiner)
    _check_options("fairness_options", fairness_options, SinkhornFairnessLoss)
    for part, wanted, name, value in (
        ("mining", mining, "miner_options", miner_options or None),
        ("fairness", fairness, "fairness_options", fairness_options or None),
        ("fairness", fairness, "fairness_weight", fairness_weight),
        ("fairness", fairness, "fairness_start", fairness_start),
        ("fairness", fairness, "score", score),
    ):
        if not wanted and value is not None:
            raise ValueError(f"{name} needs {part}=True, got {part}=False and {name}={value!r}")
    if total_epochs is not None:
        total_epochs = check_integer("total_epochs", total_epochs, 1)
    if mining:
        miner = _build_miner(chosen, num_pairs, total_epochs, miner_options or {})
    if fairness:
        groups = {"num_groups": num_groups}
        term = SinkhornFairnessLoss(**{**groups, **chosen.fairness, **(fairness_options or {})})
    return FairLoss(
        base_loss,
        miner,
        term,
        chosen.fairness_weight if fairness_weight is None else fairness_weight,
        chosen.score if score is None else score,
        fairness_start=0 if fairness_start is None else fairness_start,
        normalization=chosen.normalization,
        mining_unit=chosen.mining_unit,
    )


def _build_miner(
    chosen: Preset, num_pairs: int | None, total_epochs: int | None, given: Mapping[str, Any]
) -> BadPairMiner:
    """Return the preset's miner with the given options on top."""
    # The published unit counts batches, of which the data set's size says nothing.
    pairs = num_pairs if chosen.mining_unit == "pair" else None
    warmup = max(1, round(chosen.warmup_share * (total_epochs or 0)))
    known = {"num_pairs": pairs, "total_epochs": total_epochs, "warmup_epochs": warmup}
    settings = {**known, **chosen.miner, **given}
    if "weighting" in settings and "detector" not in given:
        posterior = settings["weighting"] == "posterior"
        settings["detector"] = "mixture" if posterior else "threshold"
    if settings.get("detector") == "mixture" and "faulty_sigma" in given:
        raise ValueError(
            "faulty_sigma has no effect on faulty pairs found by a mixture, got "
            f"{given['faulty_sigma']!r}: leave it out, or choose weighting='relative' and "
            "detector='threshold'"
        )
    return BadPairMiner(**settings)


def _check_options(name: str, given: Mapping[str, Any] | None, part: type[nn.Module]) -> None:
    """Refuse options that are no mapping, or that the part does not have."""
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} must be a mapping name -> value, got {type(given).__name__}")
    known = list(inspect.signature(part).parameters)
    unknown = [option for option in given if option not in known]
    if unknown:
        raise ValueError(
            f"{name} must be among {', '.join(known)} of {part.__name__}, "
            f"got {', '.join(map(repr, unknown))}"
        )
