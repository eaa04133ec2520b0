"""The fine model: nearer to the real one than the shipped model, beside the benchmarks and not in the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

MODEL = Path(__file__).parent / "model"


def load(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, Any]:
    """The fine model, in eval mode, and its processor.

    1,028 visual tokens a picture (4 tiles of 80 pixels, patches of 5), 8 query and 2 key-value heads. It reads the scenes of
    ``draw_scene(seed, scale=2, ...)``.

    Example:
        >>> model, processor = load()
        >>> model.config.text_config.num_key_value_heads, processor.image_processor.size["height"]
        (2, 80)
    """
    from transformers import AutoProcessor, MllamaForConditionalGeneration

    model = MllamaForConditionalGeneration.from_pretrained(MODEL, dtype=dtype).to(device).eval()
    return model, AutoProcessor.from_pretrained(MODEL)


__all__ = ["MODEL", "load"]
