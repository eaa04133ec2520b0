"""A row: pictures with a question or a chat, checked before the model sees any of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import get_optimal_tiled_canvas

from trim_plugin.pictures.prompting import BROKEN, open_picture, opened
from trim_plugin.pictures.rgb import to_rgb

FIELDS = ("id", "images", "question", "messages", "max_new_tokens")
#: A picture: a file, a file's bytes, or the picture itself.
Source = Path | bytes | Image.Image


class RowError(ValueError):
    """What is wrong with a row, in a sentence; the other rows of a batch are answered all the same."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A row that is fit to be answered, as far as can be told without decoding its pictures.

    Args:
        text: the prompt as the tokenizer gets it.
        pictures: its pictures, not decoded yet.
        tokens: text tokens of the prompt.
        tiles: real tiles of all its pictures.
        max_new_tokens: longest answer; None is the worker's.
    """

    text: str
    pictures: tuple[Source, ...]
    tokens: int
    tiles: int
    max_new_tokens: int | None = None


def read_row(processor: Any, row: Mapping[str, Any], folder: Path) -> Prompt:
    """Check a row and write its prompt in the processor's chat format.

    Args:
        processor: an `MllamaProcessor`.
        row: "images" (a list; may be left out), and "question" or "messages"; perhaps "id" and "max_new_tokens". An image is
            the name of a file, a file's bytes, or a Pillow picture. Messages are a chat's, whose parts `{"type": "image"}` stand
            for the images in their order; without such parts the images stand in front of the first message's text.
        folder: what relative names of files start from.

    Raises:
        RowError: the row cannot be answered.

    Example:
        >>> from trim_plugin.embedded import examples, load_small_model
        >>> _, processor = load_small_model()
        >>> row = {"images": [examples()[0].picture], "question": "Which digit is red?"}
        >>> read_row(processor, row, Path()).text
        '<|bos|><|user|><|image|>Which digit is red?<|assistant|>'
        >>> read_row(processor, {"question": " "}, Path())
        Traceback (most recent call last):
        ...
        trim_plugin.batching.rows.RowError: 'question' must be a text that is not empty, got ' '
    """
    if not isinstance(row, Mapping):
        raise RowError(
            f"a row must be an object such as {{'images': [...], 'question': ...}}, got {type(row).__name__}"
        )
    unknown = sorted(str(name) for name in row if name not in FIELDS)
    if unknown:
        raise RowError(f"unknown field {unknown[0]!r}. Allowed: {', '.join(FIELDS)}")
    pictures = tuple(_source(image, folder) for image in _images(row.get("images")))
    text = _prompt(processor, row, len(pictures))
    found = text.count(processor.image_token)
    if found != len(pictures):
        raise RowError(f"the prompt names {found} pictures ({processor.image_token}), but {len(pictures)} are given")
    return Prompt(
        text=text,
        pictures=pictures,
        tokens=len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]),
        tiles=sum(_tiles(picture, processor.image_processor) for picture in pictures),
        max_new_tokens=_count(row.get("max_new_tokens")),
    )


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
        raise RowError(_said(error)) from None


def _images(given: Any) -> Sequence[Any]:
    if given is None:
        return ()
    if isinstance(given, str | bytes | Path | Image.Image) or not hasattr(given, "__iter__"):
        raise RowError(f"'images' must be a list, got {type(given).__name__}")
    return list(given)


def _source(image: Any, folder: Path) -> Source:
    if isinstance(image, bytes | Image.Image):
        return image
    if not isinstance(image, str | Path) or not str(image):
        raise RowError(f"an image must be a file's name, its bytes or a picture, got {image!r}")
    return folder / image


def _prompt(processor: Any, row: Mapping[str, Any], pictures: int) -> str:
    question, messages = row.get("question"), row.get("messages")
    if (question is None) == (messages is None):
        raise RowError("give either 'question' or 'messages'")
    if question is not None and (not isinstance(question, str) or not question.strip()):
        raise RowError(f"'question' must be a text that is not empty, got {question!r}")
    chats = bool(getattr(processor, "chat_template", None))
    if not chats:
        if messages is not None:
            raise RowError("'messages' need a model with a chat format; give 'question'")
        return str(processor.image_token * pictures + question)
    if messages is None:
        messages = [{"role": "user", "content": question}]
    try:
        written = processor.apply_chat_template(
            _with_pictures(messages, pictures), add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RowError(f"'messages' do not fit the model's chat format: {_said(error)}") from None
    return str(written)


def _with_pictures(messages: Any, pictures: int) -> list[dict[str, Any]]:
    """Messages whose contents are lists of parts, with a part for every picture."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RowError(f"'messages' must be a list that is not empty, got {messages!r}")
    chat = [_message(message) for message in messages]
    if not any(part["type"] == "image" for message in chat for part in message["content"]):
        first = next((message for message in chat if message["role"] == "user"), chat[0])
        first["content"] = [*({"type": "image"} for _ in range(pictures)), *first["content"]]
    return chat


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
        raise RowError(f"a message must have a 'role' and a 'content', got {message!r}")
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RowError(f"a message's 'content' must be a text or a list of parts, got {content!r}")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
            raise RowError(
                f"a part of a message must be {{'type': 'text', 'text': ...}} or {{'type': 'image'}}, got {part!r}"
            )
    return {**message, "content": [dict(part) for part in content]}


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
        raise RowError(f"cannot read {name!s}: {_said(error)}") from None
    size = image_processor.size["height"]
    high, wide = get_optimal_tiled_canvas(height, width, image_processor.max_image_tiles, size)
    return int(high // size) * int(wide // size)


def _count(given: Any) -> int | None:
    if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
        raise RowError(f"'max_new_tokens' must be a positive number, got {given!r}")
    return given


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
