"""A tiny CLIP and a tiny data set on disk, for tests that run open_clip's own programs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import open_clip
from PIL import Image

from fairclip_losses.data import write_table

TOWER = {"width": 32, "layers": 1}
CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {**TOWER, "image_size": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {**TOWER, "context_length": 12, "vocab_size": 49408, "heads": 2},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
}
HEADER = ("pair", "filepath", "title", "sex", "site", "bright")


# open_clip reads a model from a folder since this version; before, a process registers it.
HAS_LOCAL_DIR = int(open_clip.__version__.split(".")[0]) >= 3
_REGISTERED = "tiny_clip_of_the_tests"


def write_model(folder: Path) -> str:
    """Write the configuration; return the name by which open_clip finds it in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    if HAS_LOCAL_DIR:
        (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    else:
        path = folder / f"{_REGISTERED}.json"
        path.write_text(json.dumps(CONFIG["model_cfg"]))
        open_clip.add_model_config(path)
    return model_name(folder)


def model_name(folder: Path) -> str:
    """Return the name by which open_clip finds the model that was written to the folder."""
    return f"local-dir:{folder}" if HAS_LOCAL_DIR else _REGISTERED


def as_process(folder: Path, module: str) -> tuple[list[str], dict[str, str]]:
    """Return the arguments of Python, and the environment, to run a module that finds the model."""
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    if HAS_LOCAL_DIR:
        return ["-m", module], environment
    environment["TINY_MODEL"] = str(folder / f"{_REGISTERED}.json")
    return ["-m", "with_tiny_model", module], environment


def write_data(folder: Path, pairs: int, val: int = 0) -> dict:
    """Write the model and tables of so many pairs; return where they are, and their folder."""
    tables = {"train": str(write_pairs(folder, pairs, "train"))}
    if val:
        tables["val"] = str(write_pairs(folder, val, "val", seed=1))
    return {"folder": folder, "model": write_model(folder / "tiny"), **tables}


def write_pairs(folder: Path, count: int, name: str, seed: int = 0) -> Path:
    """Write ``count`` images and their table: bright or dark pictures, two attributes."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(count):
        bright = int(rng.integers(2))
        pixels = rng.integers(100 * bright, 100 * bright + 156, (32, 32, 3), dtype=np.uint8)
        file = folder / f"{name}_{row}.png"
        Image.fromarray(pixels).save(file)
        caption = f"a {'bright' if bright else 'dark'} picture, number {row}"
        sex = ("f", "m", "")[0 if row % 3 else 1 + row % 2]
        rows.append((1000 - 7 * row, file, caption, sex, row % 2, bright))
    path = folder / f"{name}.tsv"
    write_table(path, HEADER, rows, "\t")
    return path
