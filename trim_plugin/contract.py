"""The contract with transformers: what the hooks and the wrapped methods take for granted, checked before they are put in place.

A name that a later version has changed would otherwise show far from its cause: a hook that looks for a cache under its
former name finds none, and nothing is trimmed. So whatever the hooks read, replace, wrap or override stands in the
tables below, and what is missing is named by an `UnsupportedTransformersError` before anything runs.

A model is checked when it gets its hooks. Signatures are kept as long as their functions live, so that the next model costs some
microseconds (`tests/test_contract.py`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from trim_plugin.compat import CACHE, UnsupportedTransformersError, unsupported

MIXIN, CONFIGURATION = "transformers.generation.utils", "transformers.generation.configuration_utils"
MLLAMA, CACHES = "transformers.models.mllama.modeling_mllama", "transformers.cache_utils"
OUTPUTS, MASKS = "transformers.modeling_outputs", "transformers.masking_utils"

#: Arguments of forwards, by class, that hooks read or replace, or that are passed by name.
FORWARDS: dict[str, tuple[str, ...]] = {
    "MllamaModel": (
        *("input_ids", "inputs_embeds", "attention_mask", "use_cache", CACHE),
        *("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_states", "cross_attention_mask"),
    ),
    "MllamaTextModel": (
        *("input_ids", "inputs_embeds", "attention_mask", "use_cache", CACHE),
        *("cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask"),
    ),
    "MllamaCrossAttentionDecoderLayer": (
        *("hidden_states", "attention_mask", CACHE),
        *("cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask"),
    ),
    "MllamaTextCrossAttention": ("hidden_states", "cross_attention_states", "attention_mask", CACHE),
    "MllamaVisionModel": ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"),
    "MllamaVisionEncoder": ("hidden_states", "attention_mask"),
    "MllamaVisionEncoderLayer": ("attention_mask",),
}

#: Arguments of the wrapped methods, by class: those that come first, in this order, and those passed by name.
METHODS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "GenerationMixin": {
        "_prepare_cache_for_generation": (
            ("generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"),
            (),
        ),
        "_prefill": (("input_ids", "generation_config", "model_kwargs"), ()),
        "_get_candidate_generator": ((), ("input_ids", "model_kwargs")),
    },
    "GenerationConfig": {"to_json_string": (("use_diff", "ignore_metadata"), ()), "to_json_file": ((), ())},
}

#: The same of functions of `MASKS`, behind the configuration.
MASK_FUNCTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "create_causal_mask": (("inputs_embeds", "attention_mask", CACHE), ("allow_is_causal_skip",)),
}

#: Fields of `GenerationConfig` that the wrapped methods read.
SETTINGS = (
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "disable_compile"),
    *("num_beams", "num_return_sequences", "prefill_chunk_size", "is_assistant"),
)

#: Names of `cache_utils`, and the methods that a trimmed cache and its layers override or call.
_LAYER = (
    *("update", "lazy_initialization", "get_seq_length", "get_mask_sizes", "get_max_length", "reset", "reorder_cache"),
)
CACHE_CLASSES: dict[str, tuple[str, ...]] = {
    "Cache": (
        *("update", "get_seq_length", "get_query_offset", "get_mask_sizes", "get_max_length", "reset", "crop"),
        *("reorder_cache", "batch_repeat_interleave", "batch_select_indices"),
    ),
    "DynamicLayer": (*_LAYER, "crop", "batch_repeat_interleave", "batch_select_indices"),
    "StaticLayer": _LAYER,
}

#: Outputs of forwards that carry the cache under its name.
WITH_CACHE = ("BaseModelOutputWithPast", "CausalLMOutputWithPast")

#: What is imported from further modules.
NAMES: dict[str, tuple[str, ...]] = {
    "transformers.generation.candidate_generator": ("AssistedCandidateGenerator", "PromptLookupCandidateGenerator"),
    "transformers.distributed.fsdp": ("is_fsdp_managed_module",),
    "transformers.integrations.deepspeed": ("is_deepspeed_zero3_enabled",),
    "transformers.modeling_utils": ("ALL_ATTENTION_FUNCTIONS",),
    MLLAMA: ("eager_attention_forward",),
}

#: Attributes of a cross-attention decoder layer and of its attention, with which queries and keys are worked out again and read.
LAYER = ("cross_attn", "input_layernorm")
ATTENTION = (
    *("q_proj", "q_norm", "k_proj", "k_norm", "scaling"),
    *("num_heads", "num_key_value_heads", "num_key_value_groups", "head_dim", "config", "layer_idx"),
)


def check_generation() -> None:
    """Check what `generation.registration` wraps and reads. Loads transformers' generation alone.

    Raises:
        UnsupportedTransformersError: something is missing; it names all that is.
    """
    _raise_if([*_missing_in_generation()])


def check_contract() -> None:
    """Check all that does not depend on a model. Loads transformers' Mllama.

    Raises:
        UnsupportedTransformersError: something is missing; it names all that is.

    Example:
        >>> check_contract()
    """
    _raise_if([*_missing_in_generation(), *_missing_in_models()])


def check_modules(modules: Iterable[Any]) -> None:
    """Check the modules of a model that will carry hooks: a subclass, or what another package has put on one, may differ.

    Raises:
        UnsupportedTransformersError: one lacks an argument of its forward, or what queries and keys are worked out with.
    """
    _raise_if(list(dict.fromkeys(name for module in modules for name in _missing_in_module(module))))


@contextlib.contextmanager
def naming_missing_imports() -> Iterator[None]:
    """Within this context an import from transformers that fails is raised as what it is: an unsupported transformers.

    Example:
        >>> with naming_missing_imports():
        ...     from transformers.cache_utils import ForgetfulCache
        Traceback (most recent call last):
        ...
        trim_plugin.compat.UnsupportedTransformersError: ... did not find: ForgetfulCache in transformers.cache_utils. ...
    """
    try:
        yield
    except UnsupportedTransformersError:
        raise
    except ImportError as error:
        module = error.name or ""
        if module.partition(".")[0] != "transformers":
            raise
        name = re.search(r"cannot import name '(\w+)'", str(error))
        raise unsupported([f"{name[1]} in {module}" if name else module]) from error


def _raise_if(missing: Sequence[str]) -> None:
    if missing:
        raise unsupported(missing)


def _missing_in_module(module: Any) -> Iterator[str]:
    name = next((one.__name__ for one in type(module).__mro__ if one.__name__ in FORWARDS), None)
    own = vars(module).get("forward")  # set on the module itself, where it takes no self
    taken = arguments_of(type(module).forward) if own is None else _named(own, first=0)
    if name is not None and taken is not None:
        yield from (
            f"{argument}= of {type(module).__name__}.forward" for argument in FORWARDS[name] if argument not in taken
        )
    if name == "MllamaCrossAttentionDecoderLayer":
        yield from (f"{type(module).__name__}.{one}" for one in LAYER if not hasattr(module, one))
        attention = getattr(module, "cross_attn", None)
        if attention is not None:
            yield from (f"{type(attention).__name__}.{one}" for one in ATTENTION if not hasattr(attention, one))


def _missing_in_generation() -> Iterator[str]:
    configuration, mixin = importlib.import_module(CONFIGURATION), importlib.import_module(MIXIN)
    if not isinstance(getattr(configuration, "ALL_CACHE_IMPLEMENTATIONS", None), tuple):
        yield f"ALL_CACHE_IMPLEMENTATIONS, a tuple, in {CONFIGURATION}"
    for module, name in ((configuration, "GenerationConfig"), (mixin, "GenerationMixin")):
        owner = getattr(module, name, None)
        if owner is None:
            yield f"{name} in {module.__name__}"
        else:
            yield from _missing_methods(owner, METHODS[name])
    if hasattr(configuration, "GenerationConfig"):
        yield from (f"GenerationConfig.{name}" for name in _settings_not_in(configuration.GenerationConfig))


def _missing_methods(owner: Any, methods: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]) -> Iterator[str]:
    for name, (first, by_name) in methods.items():
        method = getattr(owner, name, None)
        if method is None:
            yield f"{owner.__name__}.{name}"
            continue
        found = arguments_of(method)
        if found is None:
            continue
        if found[: len(first)] != first:
            yield f"{owner.__name__}.{name}({', '.join(first)}, ...): it takes ({', '.join(found)})"
        yield from (f"{argument}= of {owner.__name__}.{name}" for argument in by_name if argument not in found)


def _missing_in_models() -> Iterator[str]:
    mllama = importlib.import_module(MLLAMA)
    for name, arguments in FORWARDS.items():
        found = getattr(mllama, name, None)
        if found is None:
            yield f"{name} in {MLLAMA}"
            continue
        # Something else in its place has no arguments to compare.
        taken = arguments_of(found.forward) if callable(found.forward) else None
        if taken is not None:
            yield from (f"{argument}= of {name}.forward" for argument in arguments if argument not in taken)
    caches = importlib.import_module(CACHES)
    for name, methods in CACHE_CLASSES.items():
        found = getattr(caches, name, None)
        if found is None:
            yield f"{name} in {CACHES}"
        else:
            yield from (f"{name}.{method}" for method in methods if not hasattr(found, method))
    yield from _missing_methods(importlib.import_module(MASKS), MASK_FUNCTIONS)
    outputs = importlib.import_module(OUTPUTS)
    for name in WITH_CACHE:
        if CACHE not in getattr(getattr(outputs, name, None), "__dataclass_fields__", {}):
            yield f"{name}.{CACHE} in {OUTPUTS}"
    for module, names in NAMES.items():
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            yield module
            continue
        yield from (f"{name} in {module}" for name in names if not hasattr(found, name))


@functools.lru_cache(maxsize=256)
def arguments_of(function: Callable[..., Any]) -> tuple[str, ...] | None:
    """The arguments of a method without the first, seen through decorators; None for a wrapper that hands on anything."""
    return _named(function, first=1)


def _named(function: Callable[..., Any], first: int) -> tuple[str, ...] | None:
    """What `arguments_of` returns, from argument `first` on. Not remembered: a module's own `forward` dies with the module."""
    parameters = list(inspect.signature(function).parameters.values())
    named = [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    hands_on = {one.kind for one in parameters} >= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return None if hands_on and len(named) <= first else tuple(named[first:])


@functools.cache
def _settings_not_in(settings: type) -> tuple[str, ...]:
    blank = settings()
    return tuple(name for name in SETTINGS if not hasattr(blank, name))
