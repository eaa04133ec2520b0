"""Scenes of coloured handwritten digits, drawn from seeds.

A scene is a picture on one of the eight tile layouts of up to four tiles. It shows 1 to 8 digits, each in a colour of
its own, at free positions without overlap, on a dark tinted background with noise and light clutter. The digits are the
1,797 real 8x8 pictures of scikit-learn's ``load_digits`` (the UCI Optical Recognition of Handwritten Digits set):
training draws from the first 1,400 and evaluation from the remaining 397.

The same seed, pool and arguments give the same picture, bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

TILE = 40
"""Side of a tile in pixels at scale 1."""
TRAIN_DIGITS = 1400
"""Digits before this index are for training, the rest for evaluation only."""

LAYOUTS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
"""(rows, columns) of tiles."""

COLOURS = {
    "red": (225, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (245, 235, 60),
    "green": (40, 185, 60),
    "cyan": (60, 215, 230),
    "blue": (55, 90, 250),
    "pink": (255, 110, 195),
    "white": (240, 240, 240),
}
"""Colour names in the order in which lists name them."""

MAX_DIGITS = {1: 4, 2: 6, 3: 8, 4: 8}
"""Most digits in a scene, by its number of tiles."""

SMALLEST, LARGEST = 10.0, 16.0
"""Side of a digit's box in pixels at scale 1."""


@dataclass(frozen=True)
class Digit:
    """One digit of a scene: its value, colour name and box (left, top, right, bottom) in pixels of the picture."""

    value: int
    colour: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """A picture and the truth about it; ``digits`` are in the order of :data:`COLOURS`."""

    image: Image.Image
    digits: tuple[Digit, ...]
    layout: tuple[int, int]

    @property
    def tiles(self) -> int:
        """Number of tiles of the layout that the scene was drawn on."""
        return self.layout[0] * self.layout[1]


@lru_cache(maxsize=2)
def digit_pool(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 8, 8) in 0..255 and values (n,) of the training digits or of the held-out ones."""
    data = load_digits()
    part = slice(TRAIN_DIGITS, None) if held_out else slice(0, TRAIN_DIGITS)
    return (data.images[part] * (255 / 16)).astype(np.uint8), data.target[part].astype(int)


def draw_scene(
    seed: int,
    *,
    held_out: bool,
    augment: bool | None = None,
    layout: tuple[int, int] | None = None,
    count: int | None = None,
    upscale: float = 1.0,
    scale: int = 1,
) -> Scene:
    """Draw one scene.

    Args:
        seed: any non-negative integer.
        held_out: draw from the evaluation digits instead of the training digits.
        augment: distort digits strongly, and vary the picture's size and resolution (default: for training only).
        layout: (rows, columns) of tiles; drawn from the seed if None.
        count: number of digits; drawn from the seed if None.
        upscale: enlarge the finished picture by this factor.
        scale: draw everything at this many times the resolution: the same scene, with finer strokes and noise.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout}")
    augment = not held_out if augment is None else augment
    rng = np.random.default_rng([int(held_out), seed])
    drawn = LAYOUTS[rng.integers(len(LAYOUTS))]
    rows, columns = layout = layout or drawn
    height, width = rows * TILE * scale, columns * TILE * scale
    if augment and rng.random() < 0.2:  # pictures that don't fill their tiles
        height -= int(rng.integers(0, 13)) * scale if rows > 1 else 0
        width -= int(rng.integers(0, 13)) * scale if columns > 1 else 0

    most = MAX_DIGITS[rows * columns]
    if count is None:
        count = int(rng.integers(1, most + 1))
    elif not 1 <= count <= most:
        raise ValueError(f"count must be 1 to {most} on {rows * columns} tiles, got {count}")

    canvas = _background(rng, height, width)
    _clutter(rng, canvas, scale)
    images, values = digit_pool(held_out)
    boxes = _places(rng, height, width, count, scale)
    names = list(COLOURS)
    digits = []
    for box, colour in zip(boxes, rng.permutation(len(names)), strict=False):
        value = int(rng.integers(10))  # every value equally often
        index = int(rng.choice(np.flatnonzero(values == value)))
        _paint(rng, canvas, images[index], box, COLOURS[names[colour]], augment)
        digits.append(Digit(value, names[colour], box))
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(2, 9)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))

    if augment and rng.random() < 0.25:
        upscale *= float(rng.uniform(1.2, 4.0))
    if upscale != 1.0:
        size = (round(width * upscale), round(height * upscale))
        image = image.resize(size, Image.Resampling.BICUBIC)
        sx, sy = size[0] / width, size[1] / height
        digits = [
            Digit(d.value, d.colour, (d.box[0] * sx, d.box[1] * sy, d.box[2] * sx, d.box[3] * sy)) for d in digits
        ]
    digits.sort(key=lambda digit: names.index(digit.colour))
    return Scene(image, tuple(digits), layout)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A dark tint that changes slowly over the picture."""
    corners = rng.uniform(0, 60, 3) + rng.uniform(-14, 14, (2, 2, 3))
    down = np.linspace(0, 1, height)[:, None, None]
    right = np.linspace(0, 1, width)[None, :, None]
    top = corners[0, 0] * (1 - right) + corners[0, 1] * right
    bottom = corners[1, 0] * (1 - right) + corners[1, 1] * right
    return (top * (1 - down) + bottom * down).astype(np.float32)


def _clutter(rng: np.random.Generator, canvas: np.ndarray, scale: int) -> None:
    """Dim strokes and dots under the digits, about three a tile."""
    height, width, _ = canvas.shape
    for _ in range(rng.poisson(3 * height * width / (TILE * scale) ** 2)):
        dim = rng.uniform(50, 110) + rng.uniform(-15, 15, 3)
        length = rng.uniform(0, 11) * scale
        angle = rng.uniform(0, np.pi)
        steps = np.linspace(0, length, int(length) + 2)
        ys = np.clip(rng.uniform(0, height) + steps * np.sin(angle), 0, height - 1).astype(int)
        xs = np.clip(rng.uniform(0, width) + steps * np.cos(angle), 0, width - 1).astype(int)
        canvas[ys, xs] = 0.4 * canvas[ys, xs] + 0.6 * dim


def _places(
    rng: np.random.Generator, height: int, width: int, count: int, scale: int
) -> list[tuple[float, float, float, float]]:
    """Boxes that don't overlap. Five of six are kept inside one tile, the others may cross tile borders."""
    tile, smallest = TILE * scale, SMALLEST * scale
    largest = min(LARGEST * scale, np.sqrt(0.42 * height * width / count))
    while True:
        boxes: list[tuple[float, float, float, float]] = []
        for _ in range(count):
            inside = rng.random() < 5 / 6
            for _ in range(60):
                side = rng.uniform(smallest, max(largest, smallest))
                left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
                box = (left, top, left + side, top + side)
                crosses = left // tile != (box[2] - scale) // tile or top // tile != (box[3] - scale) // tile
                if inside and crosses:
                    continue
                if all(box[2] <= b[0] or b[2] <= box[0] or box[3] <= b[1] or b[3] <= box[1] for b in boxes):
                    boxes.append(box)
                    break
        if len(boxes) == count:
            return boxes
        largest = max(smallest, largest * 0.95)


def _paint(
    rng: np.random.Generator,
    canvas: np.ndarray,
    digit: np.ndarray,
    box: tuple[float, float, float, float],
    colour: tuple[int, int, int],
    augment: bool,
) -> None:
    """Paint one digit into its box: jittered, in its colour, over the canvas."""
    left, top = int(np.floor(box[0])), int(np.floor(box[1]))
    size = int(np.ceil(box[2] - box[0])) + 2
    # Source coordinates (in the 8x8 picture, its centre at 4) of the output's four corners: rotation, shear, stretch.
    turn = np.deg2rad(rng.uniform(-16, 16) if augment else rng.uniform(-6, 6))
    shear = rng.uniform(-0.25, 0.25) if augment else rng.uniform(-0.05, 0.05)
    stretch = rng.uniform(0.85, 1.18, 2) if augment else rng.uniform(0.96, 1.04, 2)
    warp = rng.uniform(-0.6, 0.6, (4, 2)) if augment else np.zeros((4, 2))
    cos, sin = np.cos(turn), np.sin(turn)
    matrix = np.array([[cos, sin], [-sin, cos]]) @ np.array([[1.0, shear], [0.0, 1.0]]) * stretch
    scale = 8 / (box[2] - box[0])
    begin = np.array([left - box[0], top - box[1]]) * scale - 4
    end = begin + size * scale
    corners = np.array([begin, [begin[0], end[1]], end, [end[0], begin[1]]]) @ matrix.T + warp
    margin = 3
    source = Image.fromarray(np.pad(digit, margin))
    quad = tuple((corners + 4 + margin).ravel())
    mask = source.transform((size, size), Image.Transform.QUAD, quad, Image.Resampling.BICUBIC)
    alpha = np.asarray(mask, dtype=np.float32) / 255
    alpha = alpha ** (rng.uniform(0.6, 1.5) if augment else rng.uniform(0.85, 1.1))
    alpha *= rng.uniform(0.75, 1.0) if augment else rng.uniform(0.9, 1.0)
    paint = np.array(colour, dtype=np.float32) + rng.uniform(-14, 14, 3).astype(np.float32)
    bottom, right = min(top + size, canvas.shape[0]), min(left + size, canvas.shape[1])
    alpha = alpha[: bottom - top, : right - left, None]
    canvas[top:bottom, left:right] = canvas[top:bottom, left:right] * (1 - alpha) + paint * alpha
