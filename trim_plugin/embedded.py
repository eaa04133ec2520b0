"""The small trained Mllama that ships with the package, its processor, and a few pictures that it has not seen in training.

It reads coloured handwritten digits. `benchmarks/small_model` trains it and measures how well it does.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

ASSETS = Path(__file__).parent / "assets"
SMALL_MODEL = ASSETS / "small_model"


@dataclasses.dataclass(frozen=True)
class Example:
    """A held-out picture with a question about it and the true answer."""

    picture: Path
    question: str
    answer: str


def load_small_model(dtype: torch.dtype | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """The small trained model, in eval mode, and its processor; in float32 unless a dtype is given.

    Example:
        >>> model, processor = load_small_model()
        >>> type(model).__name__, type(processor).__name__
        ('MllamaForConditionalGeneration', 'MllamaProcessor')
    """
    import torch
    from transformers import AutoProcessor, MllamaForConditionalGeneration

    model = MllamaForConditionalGeneration.from_pretrained(SMALL_MODEL, dtype=dtype or torch.float32).to(device).eval()
    return model, AutoProcessor.from_pretrained(SMALL_MODEL)


def examples() -> list[Example]:
    """Held-out pictures with questions and true answers.

    Example:
        >>> first = examples()[0]
        >>> first.picture.suffix, first.question.endswith(("?", "."))
        ('.png', True)
    """
    folder = ASSETS / "pictures"
    entries = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return [Example(folder / entry["picture"], entry["question"], entry["answer"]) for entry in entries]


def ask(
    processor: Any, question: str | None = None, picture: Image.Image | Path | str | None = None
) -> dict[str, torch.Tensor]:
    """Inputs for `generate`: a picture and a question in the model's chat format; the first example's by default.

    Example:
        >>> _, processor = load_small_model()
        >>> inputs = ask(processor)
        >>> sorted(inputs)[-3:]
        ['cross_attention_mask', 'input_ids', 'pixel_values']
    """
    from PIL import Image

    from trim_plugin.pictures.prompting import build_inputs, open_picture

    example = examples()[0]
    if not isinstance(picture, Image.Image):
        picture = open_picture(Path(example.picture if picture is None else picture))
    return build_inputs(processor, question or example.question, [picture])
