"""A tiny CLIP and a tiny data set on disk, for tests that run open_clip's own programs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
from PIL import Image

from fairclip_losses.data import write_table

CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 16,
            "width": 32,
            "head_width": 16,
            "layers": 1,
        },
        "text_cfg": {
            "context_length": 12,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
}
HEADER = ("pair", "filepath", "title", "sex", "site", "bright")


# open_clip reads a model from a folder since this version; before, a process registers it.
HAS_LOCAL_DIR = int(open_clip.__version__.split(".")[0]) >= 3


def write_model(folder: Path) -> str:
    """Write the configuration; return the name by which open_clip finds it in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    if HAS_LOCAL_DIR:
        (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
        return f"local-dir:{folder}"
    path = folder / "tiny_clip_of_the_tests.json"
    path.write_text(json.dumps(CONFIG["model_cfg"]))
    open_clip.add_model_config(path)
    return path.stem


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
