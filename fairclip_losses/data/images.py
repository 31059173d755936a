"""Image files: whether they are there, and whether they have grey values of more than 8 bits.

Of such values a conversion to RGB keeps 0 to 255 alone.
"""

from __future__ import annotations

import io
import os
import re

from PIL import Image

from .groups import is_missing
from .tables import Table


def is_deep(image: Image.Image) -> bool:
    """Whether a PIL image has grey values beyond 8 bits (modes I;16, I;16B, I and F)."""
    return str(image.mode).startswith(("I", "F"))


def holds_deep_image(content: bytes) -> bool:
    """Return `is_deep` of the image in a file's content: of its header, in 1 % of decoding it."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return is_deep(image)
    except Exception:  # whatever Pillow raises: who decodes the image will say it
        return False


def deep_warning(where: str) -> str:
    """Return what to tell, once, of the first deep image met."""
    return (
        f"{where} has grey values of more than 8 bits, of which open_clip keeps 0 to 255 (above is "
        "white): write such images anew with 8 bits, by one low and high for all of them, as "
        "Image.fromarray((((np.asarray(image, 'float32') - low) / (high - low)).clip(0, 1) * 255)"
        ".astype('uint8')); said of the first such image alone"
    )


def check_images(table: Table, column: str) -> list[str]:
    """Return the image files of a table; a ValueError names the first that is not there."""
    files = table.column(column)
    for row, file in enumerate(files, start=1):
        if os.path.isfile(file):
            continue
        where = f"{table.path}: row {row}"
        if os.path.isfile(file.strip()):
            raise ValueError(
                f"{where}: white space around the image file {file!r}, which is a part of its name "
                "for open_clip; take it off"
            )
        why = [] if os.path.isabs(file) else ["paths are relative to the working directory"]
        if is_missing(file):
            why = ["the cell is empty or a missing mark such as NA"]
        elif re.fullmatch(r"[0-9]+(\.0*)?", file):
            why.append("open_clip reads a column of numbers as numbers: 000000 as 0")
        if table.has_row_names:
            why.append("the rows have more cells than the header, and open_clip skips the first")
        reasons = f" ({'; '.join(why)})" if why else ""
        raise ValueError(f"{where}: no image file {file!r}{reasons}")
    return files
