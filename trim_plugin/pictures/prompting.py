"""Opens pictures, writes prompts in the model's chat format, and makes the inputs of `generate` out of both."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from trim_plugin.durable import open_regular
from trim_plugin.pictures.rgb import POSTSCRIPT, to_rgb

#: What is read, where Pillow or a plugin of it can: formats of pictures alone. For PostScript Pillow runs another program.
FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF"),
    *("ICO", "ICNS", "PSD", "QOI", "DDS", "SGI", "SUN", "XBM", "XPM", "PCX", "TGA"),
)
#: What Pillow's decoders raise on broken files.
BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    NotImplementedError,
    struct.error,
    zlib.error,
    MemoryError,
    Image.DecompressionBombError,
)

if TYPE_CHECKING:
    import torch


def open_picture(source: Path | str | bytes) -> Image.Image:
    """Open a picture file as RGB, upright, transparency over white (`to_rgb`).

    Of an animation or a file of several pages the first is read, with a `UserWarning` that says so. Nothing but regular files
    is opened, and no program is run: PostScript is refused, which Pillow gives to Ghostscript.

    Args:
        source: a file, or a file's bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as a picture.

    Example:
        >>> open_picture("nowhere.png")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no such picture: nowhere.png
    """
    name = "the picture" if isinstance(source, bytes) else f"the picture {source}"
    try:
        with opened(source) as picture:
            # A phone's MPO file is a photo with previews beside it, nothing that a user would call several pictures.
            if getattr(picture, "is_animated", False) and picture.format != "MPO":
                warnings.warn(f"{name} holds {picture.n_frames} pictures: the first is read", UserWarning, stacklevel=2)  # type: ignore[attr-defined]
            return to_rgb(picture)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such picture: {source!s}") from None
    except UnidentifiedImageError as error:
        raise ValueError(f"{error}: {'its bytes' if isinstance(source, bytes) else source}") from None
    except BROKEN as error:
        raise ValueError(f"cannot read {name}: {error or type(error).__name__}") from None


@contextlib.contextmanager
def opened(source: Path | str | bytes) -> Iterator[Image.Image]:
    """A picture of which the header alone has been read: its size is known, its pixels are decoded once they are asked for.

    Every picture that comes from outside is opened here, a file or a file's bytes.

    Raises:
        UnidentifiedImageError: of none of the formats `FORMATS`.
        OSError, ValueError and others: `BROKEN`, what Pillow raises on broken files, and `open_regular`.

    Example:
        >>> stream = io.BytesIO()
        >>> Image.new("RGB", (3, 2)).save(stream, "PNG")
        >>> with opened(stream.getvalue()) as picture:
        ...     picture.size
        (3, 2)
    """
    Image.init()
    # A stream, never a name: Pillow maps files that it opens itself into memory, which kills the process if one is cut off.
    stream: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else open_regular(source)
    with stream:
        begin = stream.read(4)
        try:
            picture = Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN])
        except UnidentifiedImageError:
            said = POSTSCRIPT if begin in (b"%!PS", b"\xc5\xd0\xd3\xc6") else "not a picture that Pillow can read"
            raise UnidentifiedImageError(said) from None
        with picture:
            yield picture


def build_inputs(
    processor: Any,
    question: str | Sequence[Mapping[str, Any]],
    pictures: list[Image.Image],
    device: str | torch.device = "cpu",
) -> dict[str, torch.Tensor]:
    """Inputs for `generate`: the pictures, then the question, in the processor's chat format if it has one.

    Args:
        processor: an `MllamaProcessor`.
        question: plain text, or messages as for `written`.
        pictures: pictures of any size and mode; all are read by the question.
        device: where the tensors go.

    Example:
        >>> from trim_plugin.embedded import examples, load_small_model
        >>> _, processor = load_small_model()
        >>> picture = open_picture(examples()[0].picture)
        >>> build_inputs(processor, "Which digit is red?", [picture])["pixel_values"].shape[:3]
        torch.Size([1, 1, 4])
    """
    inputs = tensors_of(processor, [written(processor, question, len(pictures))], [pictures])
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def written(processor: Any, text: str | Sequence[Mapping[str, Any]], pictures: int) -> str:
    """A prompt as the tokenizer gets it: in the processor's chat format if it has one, with an image token for every picture.

    Args:
        processor: an `MllamaProcessor`.
        text: a question, or messages with a text or parts; if no part is `{"type": "image"}`, the pictures stand before the
            first text of the user.
        pictures: how many there are.

    Raises:
        ValueError: messages, and the processor has no chat format.
        jinja2.TemplateError: the chat format refuses the messages.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> _, processor = load_small_model()
        >>> written(processor, "Which digit is red?", 2)
        '<|bos|><|user|><|image|><|image|>Which digit is red?<|assistant|>'
    """
    if not getattr(processor, "chat_template", None):
        # Base models have no chat format: picture tokens, then the text to be continued.
        if not isinstance(text, str):
            raise ValueError("Messages were given, but this processor has no chat template. Give the prompt as text.")
        return str(processor.image_token * pictures + text)
    if isinstance(text, str):
        text = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    chat = [{**message, "content": _parts(message["content"])} for message in text]
    if not any(part.get("type") == "image" for message in chat for part in message["content"]):
        first = next((message for message in chat if message["role"] == "user"), chat[0])
        first["content"] = [*({"type": "image"} for _ in range(pictures)), *first["content"]]
    return str(processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))


def tensors_of(
    processor: Any, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]
) -> dict[str, torch.Tensor]:
    """What the processor makes of prompts that are `written` and their pictures, padded on the left, on the CPU.

    Args:
        processor: an `MllamaProcessor`.
        prompts: as the tokenizer gets them.
        pictures: for each its pictures, of any size and mode; all have as many, perhaps none.
    """
    settings = {
        "padding": True,
        "padding_side": "left",
        # A chat format writes the special tokens itself.
        "add_special_tokens": not getattr(processor, "chat_template", None),
        "return_tensors": "pt",
    }
    if not any(pictures):
        tokenized = processor.tokenizer(list(prompts), **settings)
        return {name: tokenized[name] for name in ("input_ids", "attention_mask")}
    images = [[to_rgb(picture) for picture in own] for own in pictures]
    return dict(processor(images=images, text=list(prompts), **settings))


def _parts(content: str | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A message's content as parts: a text alone is one of them."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
