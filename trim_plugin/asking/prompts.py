"""Writes a row's prompt in the model's chat format, counts its tokens, and checks its pictures by their headers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import get_optimal_tiled_canvas

from trim_plugin.asking import first_line
from trim_plugin.asking.rows import Row, RowError, Source, check_encodable
from trim_plugin.pictures.prompting import BROKEN, open_picture, opened, written
from trim_plugin.pictures.rgb import to_rgb

#: Characters of a text that are looked at first for every token that it may have. Few tokens have more.
CHARACTERS = 8
#: A text that is cut may have as many tokens more at the cut.
SLACK = 64


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A row that is fit to be answered, as far as can be told without decoding its pictures.

    Args:
        text: the prompt as the tokenizer gets it.
        pictures: its pictures, not decoded yet.
        tokens: text tokens of the prompt.
        tiles: real tiles of all its pictures.
    """

    text: str
    pictures: tuple[Source, ...]
    tokens: int
    tiles: int


def read_prompt(
    processor: Any, row: Row | Mapping[str, Any], folder: Path, most_tokens: int | None = None, new_tokens: int = 0
) -> Prompt:
    """Check a row and write its prompt in the processor's chat format.

    Args:
        processor: an `MllamaProcessor`.
        row: a row, or what `Row.of` makes one of. Messages without parts for images have the images before the first text.
        folder: what relative names of files start from.
        most_tokens: text tokens that prompt and answer may have together; None does not look.
        new_tokens: longest answer of rows that don't say.

    Raises:
        RowError: the row cannot be answered.

    Example:
        >>> from trim_plugin.embedded import examples, load_small_model
        >>> _, processor = load_small_model()
        >>> row = {"images": [examples()[0].picture], "question": "Which digit is red?"}
        >>> read_prompt(processor, row, Path()).text
        '<|bos|><|user|><|image|>Which digit is red?<|assistant|>'
        >>> read_prompt(processor, row, Path(), most_tokens=16, new_tokens=10)
        Traceback (most recent call last):
        ...
        trim_plugin.asking.rows.RowError: a prompt of 9 tokens and 10 new ones, but the model reads 16 at most
    """
    row = Row.of(row)
    pictures = tuple(folder / image if isinstance(image, str | Path) else image for image in row.images)
    text = _written(processor, row)
    check_encodable(text)
    found = text.count(processor.image_token)
    if found != len(pictures):
        raise RowError(f"the prompt names {found} pictures ({processor.image_token}), but {len(pictures)} are given")
    tokens = _length(processor.tokenizer, text, most_tokens, row.max_new_tokens or new_tokens)
    tiles = sum(_tiles(picture, processor.image_processor) for picture in pictures)
    return Prompt(text, pictures, tokens, tiles)


def decoded(source: Source) -> Image.Image:
    """The picture as RGB.

    Raises:
        RowError: it cannot be decoded: missing, cut off, not a picture, or too large for Pillow to take it for one.
    """
    try:
        if isinstance(source, Image.Image):
            return to_rgb(source)
        return open_picture(source)
    except BROKEN as error:
        raise RowError(first_line(error)) from None


def _written(processor: Any, row: Row) -> str:
    try:
        return written(processor, row.messages or row.question, len(row.images))
    except (TemplateError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RowError(f"'messages' do not fit the model's chat format: {first_line(error)}") from None


def _length(tokenizer: Any, text: str, most: int | None, new: int) -> int:
    """Tokens of a text. Of one that is far too long only the beginning is read, since tokenizers take their time."""
    end = len(text) if most is None else CHARACTERS * most
    while True:
        tokens = len(tokenizer(text[:end], add_special_tokens=False, verbose=False)["input_ids"])
        cut = end < len(text)
        if most is not None and tokens + new > most + SLACK * cut:
            count = f"more than {tokens - SLACK}" if cut else tokens
            raise RowError(f"a prompt of {count} tokens and {new} new ones, but the model reads {most} at most")
        if not cut:
            return tokens
        end *= CHARACTERS


def _tiles(source: Source, image_processor: Any) -> int:
    """Real tiles of a picture, from its header alone."""
    try:
        if isinstance(source, Image.Image):
            width, height = source.size
        else:
            with opened(source) as picture:
                width, height = picture.size
    except FileNotFoundError:
        raise RowError(f"no such picture: {source!s}") from None
    except BROKEN as error:
        name = "the picture" if isinstance(source, bytes) else source
        raise RowError(f"cannot read {name!s}: {first_line(error)}") from None
    size = image_processor.size["height"]
    high, wide = get_optimal_tiled_canvas(height, width, image_processor.max_image_tiles, size)
    return int(high // size) * int(wide // size)
