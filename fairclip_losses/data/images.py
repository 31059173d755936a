"""Grey images of more than 8 bits, of whose values a conversion to RGB keeps 0 to 255 alone."""

from __future__ import annotations

import io

from PIL import Image


def is_deep(image: Image.Image) -> bool:
    """Whether a PIL image has grey values beyond 8 bits (modes I;16, I;16B, I and F)."""
    return str(image.mode).startswith(("I", "F"))


def holds_deep_image(content: bytes) -> bool:
    """Return `is_deep` of the image in a file's content, by its first bytes where they say it."""
    if content.startswith(b"\x89PNG"):
        return content[24:26] == b"\x10\x00"  # 16 bits, grey
    if content.startswith((b"\xff\xd8", b"RIFF")):
        return False  # JPEG and WebP as Pillow reads them
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
