"""What the planner must know of a model, read from its configuration's JSON: neither transformers nor weights are loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from transformers import MllamaConfig

#: Models whose shape is known without a file.
SHAPES = ("11b", "90b")


@dataclasses.dataclass
class VisionNumbers:
    """Numbers of the vision tower; names and defaults are those of transformers' `MllamaVisionConfig`."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_global_layers: int = 8
    num_channels: int = 3
    image_size: int = 448
    patch_size: int = 14
    max_num_tiles: int = 4
    vision_output_dim: int = 7680
    intermediate_layers_indices: list[int] = dataclasses.field(default_factory=lambda: [3, 7, 15, 23, 30])
    supported_aspect_ratios: list[list[int]] = dataclasses.field(
        default_factory=lambda: [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    )


@dataclasses.dataclass
class TextNumbers:
    """Numbers of the text model; names and defaults are those of transformers' `MllamaTextConfig`."""

    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    cross_attention_layers: list[int] = dataclasses.field(default_factory=lambda: [3, 8, 13, 18, 23, 28, 33, 38])


@dataclasses.dataclass
class ModelNumbers:
    """What the planner reads of a model. transformers' `MllamaConfig` has the same fields, so either will do."""

    vision_config: VisionNumbers = dataclasses.field(default_factory=VisionNumbers)
    text_config: TextNumbers = dataclasses.field(default_factory=TextNumbers)


#: A model's configuration, as the planner takes it.
Configuration: TypeAlias = "ModelNumbers | MllamaConfig"


def built_in_config(shape: str) -> ModelNumbers:
    """The numbers of Llama-3.2-Vision: "11b" or "90b".

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
    return ModelNumbers(
        VisionNumbers(image_size=560),
        TextNumbers(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            cross_attention_layers=list(range(3, layers, 5)),
        ),
    )


def read_config(settings: Any) -> ModelNumbers:
    """The numbers in the parsed JSON of a model folder's config.json; what it leaves out is as in transformers.

    Raises:
        ValueError: it is no configuration of an Mllama model, or a number in it is none.

    Example:
        >>> read_config({"model_type": "mllama", "vision_config": {"image_size": 560}}).vision_config.image_size
        560
        >>> read_config({"model_type": "llama"})
        Traceback (most recent call last):
        ...
        ValueError: a llama model; trim-plugin needs an Mllama (Llama-3.2-Vision) model
    """
    kind = settings.get("model_type") if isinstance(settings, Mapping) else None
    if not isinstance(kind, str):
        raise ValueError("no model's configuration: it names no 'model_type'")
    if kind != "mllama":
        raise ValueError(f"a {kind} model; trim-plugin needs an Mllama (Llama-3.2-Vision) model")
    return ModelNumbers(
        _numbers(VisionNumbers, settings, "vision_config"), _numbers(TextNumbers, settings, "text_config")
    )


def _numbers(part: type[Any], settings: Mapping[str, Any], name: str) -> Any:
    """One part's numbers, checked."""
    given = settings.get(name)
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ValueError(f"no model's configuration: {name!r} must be an object, got {given!r}")
    found = {}
    for field in dataclasses.fields(part):
        value = given.get(field.name)
        if value is None:
            continue
        fits, kind = _CHECKS[field.type]
        if not fits(value):
            raise ValueError(f"a configuration whose {name}.{field.name} must be {kind}, got {value!r}")
        found[field.name] = value
    return part(**found)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(one, int) and one >= 0 for one in value)


#: By a field's type: whether a value fits, and what it must be.
_CHECKS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    "int": (_is_count, "a positive integer"),
    "list[int]": (_are_indices, "a list of layers"),
    "list[list[int]]": (lambda value: isinstance(value, list), "a list of shapes"),
}
