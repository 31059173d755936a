"""Tiny webdataset shards on disk, and a plain reading of them that knows nothing of the package."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import tarfile

from PIL import Image

RACES = ("Asian", "Black", "White")

# What may have happened to a shard's content.
DAMAGES = {
    "gz": lambda content: gzip.compress(content)[:12] + b"\xff" * 500,
    "gz-head": lambda content: b"\x1f\x8b\x08",
    "xz-twice": lambda content: lzma.compress(content[:5632]) * 2,
    "xz": lambda content: lzma.compress(content)[:14] + b"\xff" * 500,
    "tar-cut": lambda content: content[:6000],
}


def picture(number):
    """One colour all over, so that whatever the augmentation does the number can be read off."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (number, 255 - number, 128)).save(file, "png")
    return file.getvalue()


def number_in(image, transform):
    """The number of a picture from its tensor (3, H, W), normalised by a transform's last step."""
    normalize = transform.transforms[-1]
    return round((float(image[0].mean()) * normalize.std[0] + normalize.mean[0]) * 255)


def attributes_of(number):
    """Race as a string, unknown for each fifth pair; gender as an integer, -1 being unknown."""
    return {
        "race": None if number % 5 == 4 else RACES[number % 3],
        "gender": number % 4 // 2 if number % 7 else -1,
        "uid": f"u{number}" if number % 2 else 10_000 + number,
    }


def write_shards(
    folder, sizes, *, member=attributes_of, caption="picture number {}".format, draw=picture
):
    """Write shards of so many pairs, keys starting anew in each; return the urls in braces.

    ``member`` gives the content of a pair's json member by its number, or None for no member,
    ``caption`` its caption and ``draw`` that of its image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for position in range(size):
                content = member(number)
                parts = {"png": draw(number), "txt": caption(number).encode()}
                if content is not None:
                    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                    parts["json"] = raw
                for extension, data in parts.items():
                    info = tarfile.TarInfo(f"{position:04d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    return f"{folder}/{{00000..{len(sizes) - 1:05d}}}.tar"


def hashed(*parts):
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def read_shards(folder):
    """Number -> what the shards say of the pair: shard, key, id and json member."""
    pairs = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                key, _, extension = name.partition(".")
                if extension != "txt":
                    continue
                number = len(pairs)  # as they were written
                has_json = f"{key}.json" in tar.getnames()
                pairs[number] = {
                    "shard": path.name,
                    "key": key,
                    "id": hashed(path.name, key),
                    "json": json.load(tar.extractfile(f"{key}.json")) if has_json else None,
                }
    return pairs
