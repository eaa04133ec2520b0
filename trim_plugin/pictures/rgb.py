"""Any picture as upright RGB, as the processor's users see it: every mode of Pillow, transparency, 16 bits, orientation."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

POSTSCRIPT = "PostScript is not read, since Pillow would run Ghostscript on it; convert it to PNG"
#: What white may be in modes of one wide number a pixel. A picture whose numbers fit none of these is stretched from its least to
#: its largest.
_WHITES = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture as RGB: turned as its EXIF orientation says, transparency over white, 16-bit grey scaled to 8 bits.

    Orientation: transformers' `load_image`, which its chat templates use, applies it, while the processor alone does not. White
    behind transparency: as in transformers' `convert_to_rgb`, which Mllama's processor calls. Both clip 16 bits.

    Args:
        picture: of any mode; not changed. Of an animation the current frame.

    Raises:
        ValueError: a float picture that holds NaN or inf, or PostScript that is not decoded yet (`POSTSCRIPT`).

    Example:
        >>> to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
        >>> to_rgb(Image.new("I;16", (1, 1), 0x8080)).getpixel((0, 0))
        (128, 128, 128)
    """
    if picture.format == "EPS" and getattr(picture, "tile", None):
        raise ValueError(POSTSCRIPT)
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith(("I", "F")):  # which Pillow clips to 0 … 255 instead of scaling
        upright = _eight_bits(upright, picture.format)
    if upright.mode == "La":  # premultiplied alpha, which Pillow takes to LA alone
        upright = upright.convert("LA")
    has_alpha = {"A", "a"} & set(upright.getbands()) or upright.info.get("transparency") is not None
    if not has_alpha:
        return upright.convert("RGB")
    seen = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def _eight_bits(picture: Image.Image, file_format: str | None) -> Image.Image:
    """A picture of 16- or 32-bit numbers in mode L, or LA if one of its numbers means transparent."""
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("the picture holds NaN or inf")
    low, high = float(values.min()), float(values.max())
    if picture.mode.startswith("I;16") or (picture.mode == "I" and file_format == "PNG"):
        low, high = 0.0, 65535.0
    else:
        fitting = [white for white in _WHITES[picture.mode] if low >= 0.0 and high <= white]
        low, high = (0.0, fitting[0]) if fitting else (low, high)
    scaled = (values - low) * (255.0 / max(high - low, 1e-12))
    grey = Image.fromarray(np.rint(scaled).astype(np.uint8))
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey
