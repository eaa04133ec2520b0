"""How many bytes a request takes while it runs, and how many there are."""

from __future__ import annotations

from typing import Any

import torch

from trim_plugin.arithmetic import tile_tokens
from trim_plugin.config import TrimConfig
from trim_plugin.kv_formats import KV_FORMATS
from trim_plugin.planning.planner import expected_kept_share

#: Share of a device's free memory that running requests may take; the rest is for the forwards' own work.
OF_FREE_MEMORY = 0.7


class Room:
    """Bytes for keys and values of running requests.

    What a request takes is expected before it is read, and known afterwards: its text can grow to its longest, its visual tokens
    are counted.

    Args:
        model: the model.
        config: of the trimmed cache.
        memory: bytes; None takes a share of what the model's device has free, and on a CPU sets no limit.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> model, _ = load_small_model()
        >>> room = Room(model, TrimConfig(top_k_ratio=1.0), memory=10**6)
        >>> room.text_bytes(10), room.visual_bytes(tiles=1)
        (30720, 199680)
    """

    def __init__(self, model: Any, config: TrimConfig, memory: int | None) -> None:
        text, vision = model.config.get_text_config(), model.config.vision_config
        head_dim = text.hidden_size // text.num_attention_heads
        values = 2 * text.num_key_value_heads * head_dim
        element = torch.finfo(model.dtype).bits // 8
        crossing = len(text.cross_attention_layers)
        self._text = values * element * (text.num_hidden_layers - crossing)
        kept = values * element
        if config.kv_quantization is not None:
            kept = 2 * KV_FORMATS[config.kv_quantization].token_bytes(values // 2)
        self._visual = kept * crossing
        self._tile_tokens = tile_tokens(vision)
        self._kept_share = 1.0 if config.top_k_ratio is None else expected_kept_share(config.top_k_ratio)
        if memory is None and model.device.type == "cuda":
            memory = int(OF_FREE_MEMORY * torch.cuda.mem_get_info(model.device)[0])
        self.memory = memory

    def text_bytes(self, tokens: int) -> int:
        """Of a text of so many tokens."""
        return tokens * self._text

    def visual_bytes(self, tiles: int) -> int:
        """Expected of pictures of so many real tiles."""
        return int(tiles * self._tile_tokens * self._kept_share) * self._visual

    def kept_bytes(self, kept: int) -> int:
        """Of visual tokens that are kept."""
        return kept * self._visual

    def fits(self, taken: int, needed: int) -> bool:
        """Whether so many bytes more can be taken."""
        return self.memory is None or taken + needed <= self.memory
