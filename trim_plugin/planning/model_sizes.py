"""Bytes of Llama-3.2-Vision's weights and caches, counted from a configuration: no weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator

from trim_plugin.arithmetic import tile_tokens
from trim_plugin.kv_formats import KV_FORMATS
from trim_plugin.planning.configuration import Configuration

#: As `trim-plugin generate --weights` names them: dtypes, and bitsandbytes' formats.
WEIGHT_FORMATS = ("bf16", "fp32", "fp16", "int8", "nf4", "fp4")
QUANTIZED_WEIGHTS = ("int8", "nf4", "fp4")
#: The linear layers that quantization makes smaller, by their names in `parameters`. Projector and `lm_head` are not among them,
#: see `SKIPPED` of trim_plugin.integrations.bitsandbytes.
QUANTIZED_LAYERS = frozenset(
    ("attention_proj", "fc1", "fc2", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)
#: Values that share a scale in 4-bit weights.
WEIGHT_BLOCK = 64
#: 4-bit weights quantize their scales in blocks of this many.
SCALE_BLOCK = 256


def weight_bytes(config: Configuration, weights: str = "bf16") -> dict[str, int]:
    """Bytes of the weights by part of the model.

    Args:
        config: the model's configuration.
        weights: one of `WEIGHT_FORMATS`. "int8", "nf4" and "fp4" are bitsandbytes': linear layers are quantized, except the
            projector and `lm_head`; the rest has 16 bits.

    Raises:
        ValueError: an unknown format.

    Example:
        >>> from trim_plugin.planning.configuration import built_in_config
        >>> sum(weight_bytes(built_in_config("11b")).values())
        21340441670
    """
    if weights not in WEIGHT_FORMATS:
        raise ValueError(f"weights must be one of {', '.join(map(repr, WEIGHT_FORMATS))}, got {weights!r}.")
    element = element_size(weights)
    parts: dict[str, int] = {}
    for part, times, name, shape in parameters(config):
        small = weights in QUANTIZED_WEIGHTS and name in QUANTIZED_LAYERS
        size = _quantized_weight(shape, weights) if small else math.prod(shape) * element
        parts[part] = parts.get(part, 0) + times * size
    return parts


def cross_kv_bytes(config: Configuration, batch: int, tokens: int, kv: str | None = None, element: int = 2) -> int:
    """Bytes of the cross-attention layers' keys and values.

    Args:
        config: the model's configuration.
        batch: samples.
        tokens: visual tokens that a layer holds of each sample.
        kv: a name of `KV_FORMATS` for quantized caches, None for the model's dtype.
        element: bytes of a number in the model's dtype.

    Raises:
        ValueError: an unknown format.

    Example:
        >>> from trim_plugin.planning.configuration import built_in_config
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


def self_kv_bytes(config: Configuration, batch: int, tokens: int, element: int = 2) -> int:
    """Bytes of the self-attention layers' keys and values for `tokens` text tokens a sample.

    Example:
        >>> from trim_plugin.planning.configuration import built_in_config
        >>> self_kv_bytes(built_in_config("11b"), batch=1, tokens=128)
        16777216
    """
    text = config.text_config
    layers = text.num_hidden_layers - len(text.cross_attention_layers)
    return 2 * batch * tokens * kv_values(config) * element * layers


def dequantized_scratch(config: Configuration, weights: str) -> int:
    """Bytes of the largest 4-bit weight in 16 bits, which bitsandbytes makes while several rows are multiplied with it; else 0.

    On a CPU its kernels take several times that, which `docs/tables/memory.md` shows.

    Example:
        >>> from trim_plugin.planning.configuration import built_in_config
        >>> dequantized_scratch(built_in_config("11b"), "nf4") == 4096 * 14336 * 2
        True
    """
    if weights not in ("nf4", "fp4"):
        return 0
    return 2 * max(math.prod(shape) for _, _, name, shape in parameters(config) if name in QUANTIZED_LAYERS)


def element_size(weights: str) -> int:
    """Bytes of a number in what the model computes in.

    Example:
        >>> element_size("fp32"), element_size("nf4")
        (4, 2)
    """
    return 4 if weights == "fp32" else 2


def kv_values(config: Configuration) -> int:
    """Values of one token's keys in a layer; as many again are its values."""
    text = config.text_config
    return int(text.num_key_value_heads * (text.hidden_size // text.num_attention_heads))


def parameters(config: Configuration) -> Iterator[tuple[str, int, str, tuple[int, ...]]]:
    """Every parameter of the model: its part, how often it is there, its name in its module and its shape.

    Upstream: `MllamaForConditionalGeneration` and the modules below it.

    Example:
        >>> from trim_plugin.planning.configuration import built_in_config
        >>> sum(times * math.prod(shape) for _, times, _, shape in parameters(built_in_config("11b")))
        10670220835
    """
    vision, text = config.vision_config, config.text_config
    crossing = len(text.cross_attention_layers)
    # Cross-attention layers norm queries and keys, and have two gates.
    only_crossing = (("head_norms", (2, text.hidden_size // text.num_attention_heads)), ("gates", (2,)))
    for times, name, shape in _of_tower(config):
        yield "vision tower", times, name, shape
    yield "projector", 1, "multi_modal_projector", (text.hidden_size, vision.vision_output_dim)
    yield "projector", 1, "bias", (text.hidden_size,)
    # 8 more than the vocabulary: the image token, and seven to come.
    yield "embeddings", 1, "embed_tokens", (text.vocab_size + 8, text.hidden_size)
    for part, times, extra in (
        ("self-attention layers", text.num_hidden_layers - crossing, ()),
        ("cross-attention layers", crossing, only_crossing),
    ):
        for name, shape in (*_of_text_layer(config), *extra):
            yield part, times, name, shape
    yield "lm_head", 1, "lm_head", (text.vocab_size, text.hidden_size)
    yield "other", 1, "norm", (text.hidden_size,)


def _of_tower(config: Configuration) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    vision = config.vision_config
    width, inner = vision.hidden_size, vision.intermediate_size
    # Shapes of pictures have numbers from 1 on; 0 is a picture that pads a batch.
    shapes, of_picture = len(vision.supported_aspect_ratios) + 1, vision.max_num_tiles * width
    yield 1, "patch_embedding", (width, vision.num_channels, vision.patch_size, vision.patch_size)
    yield 1, "class_embedding", (width,)
    yield 1, "position_embedding", (tile_tokens(vision), width)
    yield 1, "tile_embedding", (shapes, tile_tokens(vision) * of_picture)
    yield 2, "aspect_ratio_embedding", (shapes, of_picture)  # before and after the local layers
    yield 3, "gate", (1,)
    yield 2, "layernorm", (2, width)  # weight and bias
    layers = vision.num_hidden_layers + vision.num_global_layers
    yield 4 * layers, "attention_proj", (width, width)
    yield layers, "fc1", (inner, width)
    yield layers, "bias", (inner,)
    yield layers, "fc2", (width, inner)
    yield layers, "bias", (width,)
    yield 2 * layers, "layernorm", (2, width)
    yield 2 * vision.num_global_layers, "gate", (1,)


def _of_text_layer(config: Configuration) -> Iterator[tuple[str, tuple[int, ...]]]:
    text = config.text_config
    width, inner, narrow = text.hidden_size, text.intermediate_size, kv_values(config)
    wide = text.num_attention_heads * (width // text.num_attention_heads)
    yield "q_proj", (wide, width)
    yield "k_proj", (narrow, width)
    yield "v_proj", (narrow, width)
    yield "o_proj", (width, wide)
    yield "gate_proj", (inner, width)
    yield "up_proj", (inner, width)
    yield "down_proj", (width, inner)
    yield "norms", (2, width)


def _quantized_weight(shape: tuple[int, ...], weights: str) -> int:
    """Bytes of a linear layer's weight in bitsandbytes' formats, scales and code books included."""
    numbers = math.prod(shape)
    if weights == "int8":
        return numbers + 4 * shape[0]
    blocks = math.ceil(numbers / WEIGHT_BLOCK)
    code_books = 4 * (16 + 256) + 4
    return math.ceil(numbers / 2) + blocks + 4 * math.ceil(blocks / SCALE_BLOCK) + code_books


def model_part(name: str, crossing: set[int]) -> str:
    """The part of the model that a parameter of this name belongs to; `crossing` are the cross-attention layers.

    Example:
        >>> model_part("model.language_model.layers.3.mlp.up_proj.weight", {3})
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
