"""The model "pages": it reads lines of printed text, beside the benchmarks and not in the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

MODEL = Path(__file__).parent / "model"


def load(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, Any]:
    """The model "pages", in eval mode, and its processor.

    1,028 visual tokens a picture (4 tiles of 80 pixels, patches of 5), 8 query and 2 key-value heads. It reads the pages of
    ``pages.scenes.draw_page``.
    """
    from transformers import AutoProcessor, MllamaForConditionalGeneration

    model = MllamaForConditionalGeneration.from_pretrained(MODEL, dtype=dtype).to(device).eval()
    return model, AutoProcessor.from_pretrained(MODEL)


__all__ = ["MODEL", "load"]
