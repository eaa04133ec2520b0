"""From a picture and a question to the inputs of `generate`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from trim_plugin.pictures.rgb import to_rgb


def open_picture(path: Path | str) -> Image.Image:
    """Open a picture file as RGB, upright, transparency over white (`to_rgb`).

    Of an animation or a file of several pages the first is read, with a `UserWarning` that says so.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: Pillow cannot read it as a picture.

    Example:
        >>> open_picture("nowhere.png")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no such picture: nowhere.png
    """
    try:
        with Image.open(path) as picture:
            # A phone's MPO file is a photo with previews beside it, nothing that a user would call several pictures.
            if getattr(picture, "is_animated", False) and picture.format != "MPO":
                warnings.warn(f"{path} holds {picture.n_frames} pictures: the first is read", UserWarning, stacklevel=2)  # type: ignore[attr-defined]
            return to_rgb(picture)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such picture: {path}") from None
    except UnidentifiedImageError:
        raise ValueError(f"not a picture that Pillow can read: {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture {path}: {error}") from None


def build_inputs(
    processor: Any, question: str, pictures: list[Image.Image], device: str | torch.device = "cpu"
) -> dict[str, torch.Tensor]:
    """Inputs for `generate`: the pictures, then the question, in the processor's chat format if it has one.

    Args:
        processor: an `MllamaProcessor`.
        question: plain text.
        pictures: pictures of any size and mode; all are read by the question.
        device: where the tensors go.

    Example:
        >>> from trim_plugin.embedded import examples, load_small_model
        >>> _, processor = load_small_model()
        >>> picture = open_picture(examples()[0].picture)
        >>> build_inputs(processor, "Which digit is red?", [picture])["pixel_values"].shape[:3]
        torch.Size([1, 1, 4])
    """
    pictures = [to_rgb(picture) for picture in pictures]
    if getattr(processor, "chat_template", None):
        content: list[dict[str, str]] = [{"type": "image"} for _ in pictures]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(images=pictures, text=prompt, add_special_tokens=False, return_tensors="pt")
    else:
        # Base models have no chat format: picture tokens, then the text to be continued.
        inputs = processor(images=pictures, text=processor.image_token * len(pictures) + question, return_tensors="pt")
    return {name: tensor.to(device) for name, tensor in inputs.items()}
