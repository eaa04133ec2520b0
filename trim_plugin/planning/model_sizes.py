"""Bytes of Llama-3.2-Vision's weights and caches, counted from a configuration: no weights are loaded."""

from __future__ import annotations

import functools
import json
import math

import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration

from trim_plugin.kv_formats import KV_FORMATS

#: As `trim-plugin generate --weights` names them: dtypes, and bitsandbytes' formats.
WEIGHT_FORMATS = ("bf16", "fp32", "fp16", "int8", "nf4", "fp4")
QUANTIZED_WEIGHTS = ("int8", "nf4", "fp4")
SHAPES = ("11b", "90b")
#: Modules that quantized weights leave in 16 bits, as trim_plugin.integrations.bitsandbytes does.
UNQUANTIZED = ("multi_modal_projector", "lm_head")
#: Values that share a scale in 4-bit weights.
BLOCK = 64
#: 4-bit weights quantize their scales in blocks of this many.
SCALE_BLOCK = 256


def built_in_config(shape: str) -> MllamaConfig:
    """The configuration of Llama-3.2-Vision: "11b" or "90b".

    Raises:
        ValueError: another name.

    Example:
        >>> built_in_config("11b").text_config.num_hidden_layers
        40
        >>> built_in_config("7b")
        Traceback (most recent call last):
        ...
        ValueError: shape must be one of '11b', '90b', got '7b'.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(map(repr, SHAPES))}, got {shape!r}.")
    layers, width, inner, heads = (40, 4096, 14336, 32) if shape == "11b" else (100, 8192, 28672, 64)
    return MllamaConfig(
        vision_config={"image_size": 560, "max_num_tiles": 4},
        text_config={
            "num_hidden_layers": layers,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "cross_attention_layers": list(range(3, layers, 5)),
            "pad_token_id": 128004,
        },
    )


def image_tokens(config: MllamaConfig) -> int:
    """Visual tokens that one image becomes, padding tiles included.

    Example:
        >>> image_tokens(built_in_config("11b"))
        6404
    """
    return int(config.vision_config.max_num_tiles) * tile_tokens(config)


def tile_tokens(config: MllamaConfig) -> int:
    """Visual tokens of one tile."""
    vision = config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2 + 1)


def weight_bytes(config: MllamaConfig, weights: str = "bf16") -> dict[str, int]:
    """Bytes of the weights by part of the model.

    Args:
        config: the model's configuration.
        weights: "bf16", "fp32", "fp16", or "int8", "nf4" and "fp4" (bitsandbytes: linear layers quantized, except the
            projector and `lm_head`, the rest in 16 bits).

    Raises:
        ValueError: an unknown format.

    Example:
        >>> sum(weight_bytes(built_in_config("11b")).values())
        21340441670
    """
    if weights not in WEIGHT_FORMATS:
        raise ValueError(f"weights must be one of {', '.join(map(repr, WEIGHT_FORMATS))}, got {weights!r}.")
    element = element_size(weights)
    crossing = set(config.text_config.cross_attention_layers)
    parts = dict.fromkeys(
        (
            "vision tower",
            "projector",
            "embeddings",
            "self-attention layers",
            "cross-attention layers",
            "lm_head",
            "other",
        ),
        0,
    )
    for name, shape, linear in _parameters(config):
        quantized = linear and weights in QUANTIZED_WEIGHTS and not _left_out(name)
        size = _quantized_weight(shape, weights) if quantized else shape.numel() * element
        parts[part_of(name, crossing)] += size
    return {name: size for name, size in parts.items() if size}


def cross_kv_bytes(config: MllamaConfig, batch: int, tokens: int, kv: str | None = None, element: int = 2) -> int:
    """Bytes of the cross-attention layers' keys and values.

    Args:
        config: the model's configuration.
        batch: samples.
        tokens: visual tokens that a sample's layer holds (the longest sample's).
        kv: a name of `KV_FORMATS` for quantized caches, None for the model's dtype.
        element: bytes of a number in the model's dtype.

    Raises:
        ValueError: an unknown format.

    Example:
        >>> cross_kv_bytes(built_in_config("11b"), batch=1, tokens=6404)
        209846272
    """
    values = kv_values(config)
    if kv is None:
        token = values * element
    elif kv in KV_FORMATS:
        token = KV_FORMATS[kv].token_bytes(values)
    else:
        raise ValueError(f"kv must be one of {', '.join(map(repr, KV_FORMATS))} or None, got {kv!r}.")
    return 2 * batch * tokens * token * len(config.text_config.cross_attention_layers)


def self_kv_bytes(config: MllamaConfig, batch: int, tokens: int, element: int = 2) -> int:
    """Bytes of the self-attention layers' keys and values for `tokens` text tokens a sample.

    Example:
        >>> self_kv_bytes(built_in_config("11b"), batch=1, tokens=128)
        16777216
    """
    text = config.text_config
    layers = text.num_hidden_layers - len(text.cross_attention_layers)
    return 2 * batch * tokens * kv_values(config) * element * layers


def dequantized_scratch(config: MllamaConfig, weights: str) -> int:
    """Bytes of the largest 4-bit weight in 16 bits, which bitsandbytes makes while several rows are multiplied with it; else 0.

    On a CPU its kernels take several times that, which `docs/tables/memory.md` shows.

    Example:
        >>> dequantized_scratch(built_in_config("11b"), "nf4") == 4096 * 14336 * 2
        True
    """
    if weights not in ("nf4", "fp4"):
        return 0
    sizes = [shape.numel() for name, shape, linear in _parameters(config) if linear and not _left_out(name)]
    return 2 * max(sizes)


def element_size(weights: str) -> int:
    """Bytes of a number in what the model computes in.

    Example:
        >>> element_size("fp32"), element_size("nf4")
        (4, 2)
    """
    return 4 if weights == "fp32" else 2


def kv_values(config: MllamaConfig) -> int:
    """Values of one token's keys in a layer; as many again are its values."""
    text = config.text_config
    return int(text.num_key_value_heads * (text.hidden_size // text.num_attention_heads))


def _parameters(config: MllamaConfig) -> tuple[tuple[str, torch.Size, bool], ...]:
    """Name, shape and whether it is a linear layer's weight, of every parameter, shared ones once."""
    return _parameters_of(config.to_json_string(use_diff=False))


@functools.lru_cache(maxsize=8)
def _parameters_of(config: str) -> tuple[tuple[str, torch.Size, bool], ...]:
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(MllamaConfig.from_dict(json.loads(config)))
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return tuple((name, parameter.shape, name in linear) for name, parameter in model.named_parameters())


def _left_out(name: str) -> bool:
    """Whether quantization leaves this parameter in 16 bits."""
    return any(part in name.split(".") for part in UNQUANTIZED)


def _quantized_weight(shape: torch.Size, weights: str) -> int:
    """Bytes of a linear layer's weight in bitsandbytes' formats, scales and code books included."""
    numbers = shape.numel()
    if weights == "int8":
        return numbers + 4 * shape[0]
    blocks = math.ceil(numbers / BLOCK)
    code_books = 4 * (16 + 256) + 4
    return math.ceil(numbers / 2) + blocks + 4 * math.ceil(blocks / SCALE_BLOCK) + code_books


def part_of(name: str, crossing: set[int]) -> str:
    """The part of the model that a parameter of this name belongs to; `crossing` are the cross-attention layers.

    Example:
        >>> part_of("model.language_model.layers.3.mlp.up_proj.weight", {3})
        'cross-attention layers'
    """
    pieces = name.split(".")
    if "vision_model" in pieces:
        return "vision tower"
    if "multi_modal_projector" in pieces:
        return "projector"
    if "embed_tokens" in pieces:
        return "embeddings"
    if "lm_head" in pieces:
        return "lm_head"
    if "layers" in pieces:
        index = int(pieces[pieces.index("layers") + 1])
        return "cross-attention layers" if index in crossing else "self-attention layers"
    return "other"
