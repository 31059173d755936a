"""Turn scikit-learn's bundled handwritten digits into an image-caption data set.

Everything the demo wants to see is planted here, so that it can be measured later:

- ``group``, the protected attribute: a minority whose images are worse (less contrast, more
  noise) and whose training captions are wrong more often;
- ``site``, a second attribute, unrelated to quality: a control that no method should need to help.

The training table holds what a user would have (file, caption, attributes) and nothing else. Which
captions are wrong is kept in a table of its own, ``truth.csv``, that only the report reads.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits

from fairclip_losses.data import write_table

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {}",
    "the digit {}",
    "a scan of the number {}",
    "somebody wrote a {} here",
    "one small grey picture of a {}",
    "number {} in pencil",
)
PROMPTS = tuple(TEMPLATES[0].format(word) for word in WORDS)
GROUPS = ("majority", "minority")
SITES = ("north", "south")
SPLITS = ("train", "val", "test")
IMAGE_SIZE = 32

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Recipe:
    """What is planted: shares of the data, and how each group's pairs are spoiled."""

    split_shares: tuple[float, float, float] = (0.6, 0.15, 0.25)
    minority_share: float = 0.28
    wrong_captions: tuple[float, float] = (0.08, 0.30)  # majority, minority; training only
    noise: tuple[float, float] = (0.05, 0.20)  # standard deviation, on a 0..1 grey scale
    contrast: tuple[tuple[float, float], tuple[float, float]] = ((0.9, 1.0), (0.3, 0.6))


@dataclass(frozen=True)
class Pairs:
    """All the pairs of one planted data set; row i is scikit-learn's image i.

    ``images`` is uint8 (N, 32, 32); the other arrays are (N,). ``digit`` is what the image shows,
    ``caption_digit`` what its caption says, and they differ exactly where ``wrong`` is true.
    """

    ids: Array
    images: Array
    captions: list[str]
    digit: Array
    caption_digit: Array
    group: Array
    site: Array
    split: Array

    @property
    def wrong(self) -> Array:
        return np.not_equal(self.digit, self.caption_digit)


@dataclass(frozen=True)
class DataFiles:
    """Paths of the written tables."""

    train: Path
    val: Path
    test: Path
    truth: Path


def plant(
    seed: int,
    recipe: Recipe | None = None,
    images: Array | None = None,
    digit: Array | None = None,
) -> Pairs:
    """Draw one data set: groups, sites, splits, spoiled images and wrong captions, from a seed.

    images: grey in 0..1, (N, h, w), and the digits (N,) that they show; None is scikit-learn's.
    """
    recipe = recipe or Recipe()
    rng = np.random.default_rng(seed)
    if images is None or digit is None:
        source = load_digits()
        images, digit = source.images / 16.0, source.target
    clean = np.asarray(images, dtype=np.float64)
    digit = np.asarray(digit, dtype=np.int64)
    count = len(digit)

    group = np.zeros(count, dtype=np.int64)
    site = np.zeros(count, dtype=np.int64)
    split = np.zeros(count, dtype=np.int64)
    for label in range(10):
        members = rng.permutation(np.flatnonzero(digit == label))
        minority = round(recipe.minority_share * len(members))
        group[members[:minority]] = 1
        for part in (members[:minority], members[minority:]):
            cuts = np.round(np.cumsum(recipe.split_shares[:2]) * len(part)).astype(int)
            for code, piece in enumerate(np.split(part, cuts)):
                split[piece] = code
                # Every second one, in random order: the control is balanced in every cell.
                site[piece] = (np.arange(len(piece)) + rng.integers(2)) % 2

    caption_digit = digit.copy()
    for code, rate in enumerate(recipe.wrong_captions):
        candidates = np.flatnonzero((group == code) & (split == 0))
        chosen = rng.choice(candidates, size=round(rate * len(candidates)), replace=False)
        caption_digit[chosen] = (digit[chosen] + rng.integers(1, 10, size=len(chosen))) % 10
    templates = rng.integers(len(TEMPLATES), size=count)
    captions = [
        TEMPLATES[template].format(WORDS[said])
        for template, said in zip(templates, caption_digit, strict=True)
    ]
    return Pairs(
        ids=10_000 + rng.permutation(count),
        images=_spoil(clean, group, recipe, rng),
        captions=captions,
        digit=digit,
        caption_digit=caption_digit,
        group=group,
        site=site,
        split=split,
    )


def _spoil(clean: Array, group: Array, recipe: Recipe, rng: np.random.Generator) -> Array:
    """Lower the contrast about mid-grey, add sensor noise at 8x8, upscale to 32x32 uint8."""
    low, high = np.asarray(recipe.contrast)[group].T
    contrast = rng.uniform(low, high)[:, None, None]
    noise = rng.normal(size=clean.shape) * np.asarray(recipe.noise)[group][:, None, None]
    grey = np.clip((0.5 + (clean - 0.5) * contrast + noise) * 255.0, 0.0, 255.0).astype(np.uint8)
    return np.stack(
        [
            np.asarray(Image.fromarray(image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC))
            for image in grey
        ]
    )


def write_data(folder: str | Path, seed: int, recipe: Recipe | None = None) -> DataFiles:
    """Write the PNG files and the four tables of one planted data set below ``folder``.

    ``train.csv``, ``val.csv`` and ``test.csv`` are tab-separated, as open_clip reads them by
    default, with the columns id, filepath, title, group, site; val and test also have ``digit``,
    the label to evaluate against. Captions are wrong in train only.
    """
    folder = Path(folder).resolve()
    pairs = plant(seed, recipe)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    paths = [images / f"{identity}.png" for identity in pairs.ids]
    for path, image in zip(paths, pairs.images, strict=True):
        Image.fromarray(image).save(path)

    # In the order of the ids, which is random: the row number tells nothing about the digit.
    truth = [
        {
            "id": pairs.ids[i],
            "source": i,
            "split": SPLITS[pairs.split[i]],
            "group": GROUPS[pairs.group[i]],
            "site": SITES[pairs.site[i]],
            "digit": pairs.digit[i],
            "caption_digit": pairs.caption_digit[i],
            "wrong": int(pairs.wrong[i]),
            "filepath": paths[i],
            "title": pairs.captions[i],
        }
        for i in np.argsort(pairs.ids)
    ]
    shown = ["id", "filepath", "title", "group", "site"]
    for split in SPLITS:
        columns = shown if split == "train" else [*shown, "digit"]
        rows = [row for row in truth if row["split"] == split]
        _write(folder / f"{split}.csv", columns, rows)
    known = ["id", "source", "split", "group", "site", "digit", "caption_digit", "wrong"]
    _write(folder / "truth.csv", known, truth)
    return DataFiles(*(folder / f"{name}.csv" for name in (*SPLITS, "truth")))


def _write(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    write_table(path, columns, [[row[name] for name in columns] for row in rows], "\t")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write one planted digits data set.")
    parser.add_argument("--output", default="build/demo/data", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    files = write_data(arguments.output, arguments.seed)
    for path in (files.train, files.val, files.test, files.truth):
        print(path)


if __name__ == "__main__":
    main()
