"""The arithmetic that configuration, forwards, cache, planner and command line share. It loads neither torch nor transformers.

Shares, visual tokens of a picture, how many pictures are read at a time, which samples' tokens lie together, and bytes in words.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

#: Visual tokens that go through the tower at a time unless the configuration says otherwise: those of one 11B picture.
TOKENS_AT_A_TIME = 6404
#: Unless the configuration says otherwise, the text model reads the pictures of this many tower calls at a time. Few cost time: a
#: micro-batch reads the text model's weights once, and unpacks 4-bit ones. Many cost memory: for a picture, the first
#: cross-attention layer needs a fifth of what the tower needs (11B: 0.18 of 0.94 GB). With 4 the tower still sets the peak, with
#: 8 it does not.
TOWER_CALLS = 4
#: Local layers of the tower that run on all tokens before patches are merged, as a share of its local layers; at least one does.
DEPTH = 0.25
#: Share of the padding that goes on through the tower, rounded up: little is read of it, but not nothing. With half of it, 3 more
#: answers of 1,000 about pictures of one tile are other than stock's; twice as much gained 1 or 2 (docs/tables/tower.md).
PADDING_SHARE = 1 / 8
#: `KCenter` projects wider states to this many values before it takes distances: 0.09 standard error of a squared distance.
FEATURES = 256
#: Share of a class's width that may be padding, and most classes; beyond it the classes that lie closest are put together.
CLASS_PADDING = 1 / 8
MOST_CLASSES = 6
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def share(name: str, value: float) -> float:
    """Return `value` as a float if it lies in (0, 1], else raise a `ValueError` that names it.

    Example:
        >>> share("mass", 0)
        Traceback (most recent call last):
        ...
        ValueError: mass must be a number in (0, 1], got 0.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be a number in (0, 1], got {value!r}.")
    return float(value)


def checked_share(value: float | None) -> float | None:
    """`tower_share` as it is used: None if the tower stays untouched, which 1.0 asks for as well.

    Raises:
        ValueError: something else than None or a number in (0, 1].

    Example:
        >>> checked_share(0.5), checked_share(1.0)
        (0.5, None)
    """
    checked = None if value is None else share("tower_share", value)
    return None if checked == 1.0 else checked


def tile_side(vision_config: Any) -> int:
    """Patches along a tile's edge."""
    return int(vision_config.image_size // vision_config.patch_size)


def tile_tokens(vision_config: Any) -> int:
    """Visual tokens of one tile, its class token and its patches, of an `MllamaVisionConfig` or whatever has its fields.

    Example:
        >>> from trim_plugin.planning.configuration import built_in_config
        >>> tile_tokens(built_in_config("11b").vision_config)
        1601
    """
    return 1 + tile_side(vision_config) ** 2


def picture_tokens(vision_config: Any) -> int:
    """Visual tokens of a picture, padding tiles included: the model pads every picture to its most tiles.

    Example:
        >>> from trim_plugin.planning.configuration import built_in_config
        >>> picture_tokens(built_in_config("11b").vision_config)
        6404
    """
    return int(vision_config.max_num_tiles) * tile_tokens(vision_config)


def pictures_at_a_time(prefill_pictures: int | None, vision_config: Any) -> int:
    """Most pictures that go through the tower at a time; `prefill_pictures` as in `TrimConfig`.

    Example:
        >>> from trim_plugin.planning.configuration import built_in_config
        >>> vision = built_in_config("11b").vision_config
        >>> pictures_at_a_time(None, vision), pictures_at_a_time(3, vision)
        (1, 3)
    """
    return prefill_pictures or max(1, TOKENS_AT_A_TIME // picture_tokens(vision_config))


def pictures_read_together(prefill_pictures: int | None, vision_config: Any) -> int:
    """Most pictures of a micro-batch that the text model reads; it reads whole samples, at least one.

    Example:
        >>> from trim_plugin.planning.configuration import built_in_config
        >>> vision = built_in_config("11b").vision_config
        >>> pictures_read_together(None, vision), pictures_read_together(3, vision)
        (4, 3)
    """
    at_a_time = pictures_at_a_time(prefill_pictures, vision_config)
    return TOWER_CALLS * at_a_time if prefill_pictures is None else at_a_time


def layers_before(local_layers: int) -> int:
    """Local layers of a tower that run on all tokens before patches are merged.

    Example:
        >>> layers_before(32), layers_before(2)
        (8, 1)
    """
    return max(1, round(DEPTH * local_layers))


def tokens_left(tiles: int, most_tiles: int, patches: int, tokens: int, kept_share: float) -> int:
    """How many of a picture's tokens go on through the tower after merging.

    Args:
        tiles: real tiles.
        most_tiles: tiles of a picture, padding tiles counted.
        patches: tokens of a tile, its class token counted, what fills it up left out.
        tokens: tokens of a picture, what fills tiles up counted.
        kept_share: share of the real tiles' patches that stay, rounded up.

    Example:
        >>> tokens_left(4, 4, 1601, 6432, 0.5), tokens_left(1, 4, 1601, 6432, 0.5)
        (3208, 1405)
    """
    real = tiles * (patches - 1)
    padding = tokens - real - tiles
    # As k-center rounds: a share of 0.1 shall be a tenth whatever floating point makes of it.
    chosen = (math.ceil(count * part - 1e-9) for count, part in ((real, kept_share), (padding, PADDING_SHARE)))
    return tiles + sum(chosen)


def classify(counts: Sequence[int], copies: Sequence[int], bucket: int) -> list[tuple[tuple[int, ...], int]]:
    """Which sources share a tensor, and how wide it is.

    Example:
        >>> classify([100, 95, 10, 90, 11], [1] * 5, bucket=0)
        [((0, 1, 3), 100), ((2, 4), 11)]
        >>> classify([100, 95, 10], [1] * 3, bucket=64)
        [((0, 1, 2), 128)]
    """
    if bucket:
        return [(tuple(range(len(counts))), -(-max(counts) // bucket) * bucket)]
    found: list[list[int]] = []
    # Widest first; a class takes what leaves little of its width empty.
    for source in sorted(range(len(counts)), key=lambda source: (copies[source], -counts[source])):
        last = found[-1] if found else None
        if last and copies[last[0]] == copies[source] and counts[source] >= counts[last[0]] * (1 - CLASS_PADDING):
            last.append(source)
        else:
            found.append([source])
    while len(found) > MOST_CLASSES:
        costs = [
            (len(narrow) * (counts[wide[0]] - counts[narrow[0]]), place)
            for place, (wide, narrow) in enumerate(itertools.pairwise(found))
            if copies[wide[0]] == copies[narrow[0]] and counts[narrow[0]] > 0
        ]
        if not costs:
            break
        _, place = min(costs)
        found[place] += found.pop(place + 1)
    widths = [max(counts[source] for source in own) for own in found]
    return sorted((tuple(sorted(own)), width) for own, width in zip(found, widths, strict=True))


def format_bytes(count: int) -> str:
    """Bytes in a unit that reads well.

    Example:
        >>> format_bytes(512), format_bytes(3 * 2**20), format_bytes(5 * 2**30)
        ('512 B', '3.0 MiB', '5.00 GiB')
    """
    if count < 2**10:
        return f"{count} B"
    if count < 2**20:
        return f"{count / 2**10:.1f} KiB"
    if count < 2**30:
        return f"{count / 2**20:.1f} MiB"
    return f"{count / 2**30:.2f} GiB"


def parse_bytes(text: str, *, zero: bool = False) -> int:
    """A number of bytes from a text with a unit, such as 24GiB, 80GB or 500MiB; with `zero` from 0 as well, which needs no unit.

    Raises:
        ValueError: it is none; the message begins with "must" or "needs", to be put behind the option's name.

    Example:
        >>> parse_bytes("1.5GiB"), parse_bytes("2MB"), parse_bytes("0", zero=True)
        (1610612736, 2000000, 0)
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", text)
    if match is None or (match[2] and match[2].upper() not in UNITS):
        raise ValueError(f"must look like 24GiB, 80GB or 500MiB, got {text}")
    number, unit = float(match[1]), match[2].upper()
    if number == 0 and zero:
        return 0
    if not unit:
        raise ValueError(f"needs a unit: {match[1]}GiB, {match[1]}GB or {match[1]}MiB, got {text}")
    size = int(number * UNITS[unit])
    if size == 0:
        raise ValueError(f"must be more than nothing, got {text}")
    return size


def taken_for(text: str, option: str) -> str | None:
    """A remark on a size in powers of ten, since cards and tools mean powers of two by it; None for other sizes.

    `parse_bytes` can read the size; `option` is what it was given as.

    Example:
        >>> taken_for("24GB", "--memory")
        '--memory 24GB is 24,000,000,000 bytes, which is 22.35 GiB. A card that is sold with 24 GB has 24GiB.'
        >>> taken_for("24GiB", "--memory")
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMG])B\s*", text, re.IGNORECASE)
    if match is None:
        return None
    size, unit = parse_bytes(text, zero=True), match[2].upper()
    return (
        f"{option} {text.strip()} is {size:,} bytes, which is {format_bytes(size)}. "
        f"A card that is sold with {match[1]} {unit}B has {match[1]}{unit}iB."
    )
