"""How many bytes a request takes while it runs, and how many there are, on every device."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from trim_plugin.arithmetic import tile_tokens
from trim_plugin.config import TrimConfig
from trim_plugin.forward.finding import cross_layers, decoder_layers, find_text_model
from trim_plugin.kv_formats import KV_FORMATS
from trim_plugin.planning.planner import expected_kept_share
from trim_plugin.selection.k_center import KCenter

#: Share of a device's free memory that running requests may take; the rest is for the forwards' own work.
OF_FREE_MEMORY = 0.7


@dataclasses.dataclass(frozen=True)
class Taken:
    """Bytes of keys and values in all layers: of text in self-attention layers, of visual tokens in cross-attention layers.

    Example:
        >>> (Taken(text=10, visual=5) + Taken(visual=1)).total
        16
    """

    text: int = 0
    visual: int = 0

    def __add__(self, other: Taken) -> Taken:
        return Taken(self.text + other.text, self.visual + other.visual)

    @property
    def total(self) -> int:
        """All of them."""
        return self.text + self.visual


@dataclasses.dataclass(frozen=True)
class Part:
    """A device's part of a model: how many of its layers keep keys and values there, and the bytes for them.

    Args:
        device: where.
        text: share of all self-attention layers.
        visual: share of all cross-attention layers.
        memory: bytes that running requests may take there; None sets no limit.
    """

    device: torch.device
    text: float
    visual: float
    memory: int | None

    def bytes_of(self, taken: Taken) -> int:
        """What of it lies here."""
        return int(self.text * taken.text + self.visual * taken.visual)


class Room:
    """Bytes for keys and values of running requests.

    What a request takes is expected before it is read, and known afterwards: its text can grow to its longest, its visual tokens
    are counted.

    Args:
        model: the model.
        config: of the trimmed cache.
        memory: bytes, on all devices together; None takes a share of what each GPU has free that holds a part of the model, and
            counts on each what lies there. A CPU sets no limit.

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
        self._kept_share = _expected_share(config)
        self.memory = memory
        #: What each device holds; empty where `memory` is given.
        self.parts = [] if memory is not None else parts_of(model)

    def text_bytes(self, tokens: int) -> int:
        """Of a text of so many tokens."""
        return tokens * self._text

    def visual_bytes(self, tiles: int, config: TrimConfig | None = None, encoded: int | None = None) -> int:
        """Expected of pictures of so many real tiles, under a request's own configuration if it has one.

        Of encoded pictures, which may hold fewer, `encoded` says how many visual tokens they hold.
        """
        kept_share = self._kept_share if config is None else _expected_share(config)
        tokens = tiles * self._tile_tokens
        return int((tokens if encoded is None else min(encoded, tokens)) * kept_share) * self._visual

    def kept_bytes(self, kept: int) -> int:
        """Of visual tokens that are kept."""
        return kept * self._visual

    def fits(self, taken: Taken, needed: Taken) -> bool:
        """Whether so many bytes more can be taken."""
        return self.lacking(taken, needed) is None

    def lacking(self, taken: Taken, needed: Taken) -> str | None:
        """What there is too little of for so many bytes more; None if they fit."""
        both = taken + needed
        if self.memory is not None and both.total > self.memory:
            return f"{needed.total} bytes of keys and values, but the engine has {self.memory} in all"
        for part in self.parts:
            if part.memory is not None and part.bytes_of(both) > part.memory:
                own = part.bytes_of(needed)
                return f"{own} bytes of keys and values on {part.device}, but the engine has {part.memory} there"
        return None


def parts_of(model: Any) -> list[Part]:
    """Where a model's layers keep keys and values, and how many bytes running requests may take there.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> parts_of(load_small_model()[0])
        [Part(device=device(type='cpu'), text=1.0, visual=1.0, memory=None)]
    """
    text_model = find_text_model(model)
    crossing = cross_layers(text_model)
    visual = [device_of(layer) for layer in crossing]
    text = [device_of(layer) for layer in decoder_layers(text_model) if layer not in crossing]
    return [
        Part(device, text.count(device) / len(text), visual.count(device) / len(visual), _free(device))
        for device in dict.fromkeys(text + visual)
    ]


def device_of(layer: torch.nn.Module) -> torch.device:
    """Where a layer runs: accelerate may keep its weights elsewhere meanwhile."""
    device: Any = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    if device is None:
        return next(layer.parameters()).device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _free(device: torch.device) -> int | None:
    """What may be taken of a GPU's free memory, which torch may hold already: it keeps what earlier work has left."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(OF_FREE_MEMORY * (torch.cuda.mem_get_info(device)[0] + kept))


def _expected_share(config: TrimConfig) -> float:
    """The share of the visible tokens that is counted on; all of them where a rule does not say."""
    if config.top_k_ratio is not None:
        return expected_kept_share(config.top_k_ratio)
    shares = (rule.kept_share for rule in config.processor_list if isinstance(rule, KCenter))
    return min((share for share in shares if share is not None), default=1.0)
