"""Pages of printed lines, a label and a number each, drawn from seeds.

A page is light or dark paper with one to eight lines such as ``cyan 271``. Labels are the eight colour words, printed in an
ink that has nothing to do with them; numbers have one to three digits. No label and no number stands on a page twice. Every
line has a font of its own and begins where it likes. The fonts are the DejaVu fonts that matplotlib ships; evaluation has a
size that training never shows.

The same seed and arguments give the same page, bit by bit, with the same versions of Pillow and matplotlib.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from benchmarks.small_model.scenes import COLOURS

TILE = 80
"""Side of a tile in pixels."""

LABELS = tuple(COLOURS)
"""The words that a line can begin with."""

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold")

TRAIN_SIZES = (13, 14, 16)
HELD_OUT_SIZE = 15
"""Pixels of an em."""

LAYOUTS = {(2, 2): 0.6, (1, 2): 0.15, (2, 1): 0.15, (1, 1): 0.1}
"""(rows, columns) of tiles, and how often a page has them."""

MOST_LINES = {1: 4, 2: 8}
"""Most lines of a page, by its rows of tiles."""

DIGITS = (0.2, 0.3, 0.5)
"""How often a number has one, two and three digits."""

_ASCENT, _DESCENT = 0.77, 0.24
"""What letters reach above and below the baseline, in ems; the digits reach 0.73 above it."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Line:
    """One line of a page. Boxes are (left, top, right, bottom) in pixels of the picture."""

    label: str
    number: str
    font: str
    label_box: Box
    digit_boxes: tuple[Box, ...]
    """A box for every digit of the number."""


@dataclass(frozen=True)
class Page:
    """A picture and the truth about it; ``lines`` from top to bottom."""

    image: Image.Image
    lines: tuple[Line, ...]
    layout: tuple[int, int]
    size: int
    """Pixels of an em."""

    @property
    def tiles(self) -> int:
        """Number of tiles of the layout that the page was drawn on."""
        return self.layout[0] * self.layout[1]


@lru_cache(maxsize=64)
def font_of(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of matplotlib's fonts."""
    path = Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def draw_page(
    seed: int,
    *,
    held_out: bool,
    layout: tuple[int, int] | None = None,
    lines: int | None = None,
    fonts: tuple[str, ...] = FONTS,
) -> Page:
    """Draw one page.

    Args:
        seed: any non-negative integer.
        held_out: print in the size of evaluation instead of those of training.
        layout: (rows, columns) of tiles; drawn from the seed if None.
        lines: number of lines; drawn from the seed if None.
        fonts: names of matplotlib's DejaVu fonts.

    Example:
        >>> page = draw_page(3, held_out=True, layout=(1, 2), lines=2)
        >>> page.image.size, [len(line.number) == len(line.digit_boxes) for line in page.lines]
        ((160, 80), [True, True])
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {tuple(LAYOUTS)}, got {layout}")
    rng = np.random.default_rng([2 + int(held_out), seed])
    drawn = tuple(LAYOUTS)[rng.choice(len(LAYOUTS), p=list(LAYOUTS.values()))]
    rows, columns = layout = layout or drawn
    most = MOST_LINES[rows]
    if lines is None:
        lines = int(rng.integers(1, most + 1))
    elif not 1 <= lines <= most:
        raise ValueError(f"lines must be 1 to {most} on {rows} rows of tiles, got {lines}")
    size = HELD_OUT_SIZE if held_out else int(rng.choice(TRAIN_SIZES))
    height, width = rows * TILE, columns * TILE
    if rng.random() < 0.2:  # pages that don't fill their tiles
        height -= int(rng.integers(0, 8))
    texts = _texts(rng, lines, size, width, fonts)
    ink = np.zeros((height, width), dtype=np.float32)
    printed = tuple(
        _print(rng, ink, *text, size, baseline)
        for text, baseline in zip(texts, _baselines(rng, lines, size, height), strict=True)
    )
    return Page(_photograph(rng, ink), printed, layout, size)


def _number(rng: np.random.Generator, most_digits: int) -> str:
    share = np.array(DIGITS[:most_digits])
    digits = int(rng.choice(most_digits, p=share / share.sum())) + 1
    return str(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))


def _texts(
    rng: np.random.Generator, lines: int, size: int, width: int, fonts: tuple[str, ...]
) -> list[tuple[str, str, str]]:
    """A label, a number and a font for every line, such that they fit beside each other."""
    found: list[tuple[str, str, str]] = []
    numbers: set[str] = set()
    for label in rng.permutation(LABELS)[:lines]:
        for attempt in range(200):
            name = fonts[rng.integers(len(fonts))]
            number = _number(rng, 3 if attempt < 4 else 2 if attempt < 12 else 1)
            font = font_of(name, size)
            if number not in numbers and font.getlength(f"{label} {number}") <= width - 4:
                break
        else:  # the narrowest font always has room for one digit, and there are more of these than lines
            raise ValueError(f"no font of {fonts} has room for {label!r} and a number on {width} pixels")
        numbers.add(number)
        found.append((str(label), number, name))
    return found


def _baselines(rng: np.random.Generator, lines: int, size: int, height: int) -> list[float]:
    """From top to bottom, at least an em apart; what is left of the height is shared out freely."""
    room = height - 2 - lines * size
    gaps = rng.dirichlet(np.ones(lines + 1)) * room
    tops = 1 + np.cumsum(gaps[:lines]) + np.arange(lines) * size
    return [float(top + 0.76 * size) for top in tops]


def _print(
    rng: np.random.Generator, ink: np.ndarray, label: str, number: str, name: str, size: int, baseline: float
) -> Line:
    """Print one line: label, gap, number, at a free indent."""
    font = font_of(name, size)
    space, words, digits = font.getlength(" "), font.getlength(label), font.getlength(number)
    free = ink.shape[1] - 4 - words - space - digits
    gap = space + min(rng.uniform(0, size), free)
    left = 2 + rng.uniform(0, free + space - gap)
    sheet = Image.new("L", (ink.shape[1], ink.shape[0]))
    pen = ImageDraw.Draw(sheet)
    pen.text((left, baseline), label, fill=255, font=font, anchor="ls")
    start = left + words + gap
    pen.text((start, baseline), number, fill=255, font=font, anchor="ls")
    strength = rng.uniform(0.75, 1.0)
    np.maximum(ink, np.asarray(sheet, dtype=np.float32) * (strength / 255), out=ink)
    edges = [start + font.getlength(number[:end]) for end in range(len(number) + 1)]
    top, bottom = baseline - _ASCENT * size, baseline + _DESCENT * size
    boxes = tuple((edges[n], top, edges[n + 1], baseline + 1) for n in range(len(number)))
    return Line(label, number, name, (left, top, left + words, bottom), boxes)


def _photograph(rng: np.random.Generator, ink: np.ndarray) -> Image.Image:
    """Ink on tinted paper that changes slowly over the page, with noise."""
    height, width = ink.shape
    light = rng.random() < 0.5
    paper, colour = rng.uniform(175, 250), rng.uniform(0, 80)
    if not light:
        paper, colour = rng.uniform(5, 70), rng.uniform(170, 255)
    corners = paper + rng.uniform(-12, 12, 3) + rng.uniform(-12, 12, (2, 2, 3))
    down, right = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    sheet = (corners[0, 0] * (1 - right) + corners[0, 1] * right) * (1 - down)
    sheet += (corners[1, 0] * (1 - right) + corners[1, 1] * right) * down
    tint = colour + rng.uniform(-30, 30, 3)
    canvas = sheet * (1 - ink[..., None]) + tint * ink[..., None]
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(2, 9)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


__all__ = ["FONTS", "HELD_OUT_SIZE", "LABELS", "LAYOUTS", "TILE", "TRAIN_SIZES", "Line", "Page", "draw_page", "font_of"]
