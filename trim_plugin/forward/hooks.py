"""Hooks on Mllama and its cross-attention decoder layers: plain functions without state, inert for any other cache."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer, MllamaModel, MllamaTextModel

from trim_plugin.attention.visibility import padding_of
from trim_plugin.cache.held import HeldCache
from trim_plugin.compat import CACHE, cache_of, checkpointing_keeps_caches, unsupported
from trim_plugin.contract import check_contract, check_layer
from trim_plugin.forward.encoded import EncodedBatch, EncodedSample
from trim_plugin.forward.prefill import Prefill
from trim_plugin.forward.step import Reading, Step
from trim_plugin.forward.tower import pictures_at_a_time, visual_states
from trim_plugin.forward.tower_merging import tower_hooks

ENCODED_AND_PIXELS = (
    "This TrimmedCache was given encoded pictures, and the call brings pixel_values as well. A turn's pictures are either "
    "encoded or not: leave pixel_values out, or encode the others too (encode_pictures with rule=None changes nothing)."
)


def attach(model: torch.nn.Module) -> Any:
    """Put the hooks on a model and its cross-attention decoder layers, once; return its `MllamaTextModel`.

    Raises:
        UnsupportedTransformersError: this transformers lacks something that the hooks rely on; none is put on then.
        ValueError: `model` holds no Mllama text model with cross-attention layers.
    """
    check_contract()
    text_model = find_text_model(model)
    check_layer(_cross_layers(text_model)[0])
    for layer in _cross_layers(text_model):
        if before_layer not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(before_layer, with_kwargs=True)
            layer.register_forward_hook(after_layer, with_kwargs=True)
    for module in _whole_models(model):
        if before_model not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(before_model, with_kwargs=True)
        own = read_pictures if isinstance(module, MllamaModel) else read_padding
        if own not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(own, with_kwargs=True)
    return text_model


def detach(model: torch.nn.Module) -> None:
    """Remove every hook that trim_plugin put on a model. Other hooks stay; a model without hooks is left as it is.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> model, _ = load_small_model()
        >>> _ = attach(model)
        >>> detach(model)
        >>> any(layer._forward_hooks for layer in model.model.language_model.layers)
        False
    """
    for module in model.modules():
        if isinstance(module, MllamaCrossAttentionDecoderLayer):
            _remove(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, before_layer)
            _remove(module._forward_hooks, module._forward_hooks_with_kwargs, after_layer)
    for module in _whole_models(model):
        for hook in (before_model, read_pictures, read_padding):
            _remove(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, hook)
    for module, hooks in tower_hooks(model):
        for hook in hooks:
            _remove(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, hook)
            _remove(module._forward_hooks, module._forward_hooks_with_kwargs, hook)


def find_text_model(model: torch.nn.Module) -> Any:
    """The `MllamaTextModel` in a model or in a wrapper around one.

    Raises:
        ValueError: there is none, or it has no cross-attention layer or no self-attention layer.
    """
    for module in model.modules():
        if isinstance(module, MllamaTextModel) and _crosses(module):
            return module
    raise ValueError(
        f"The trimmed cache needs an Mllama model (Llama-3.2-Vision) with cross-attention layers, but {type(model).__name__} "
        "has none. Use another cache_implementation for it."
    )


def has_cross_attention(model: torch.nn.Module) -> bool:
    """Whether a model, or what it wraps, can have a `TrimmedCache`."""
    return any(isinstance(module, MllamaTextModel) and _crosses(module) for module in model.modules())


def has_hooks(text_model: Any) -> bool:
    """Whether every cross-attention layer of an `MllamaTextModel` carries the hooks."""
    return all(before_layer in layer._forward_pre_hooks.values() for layer in _cross_layers(text_model))


def check_layers_get_caches(text_model: Any) -> None:
    """Raise `ValueError` if transformers would run decoder layers of an `MllamaTextModel` without the cache.

    It does so in training mode with gradient checkpointing (from 5.24 on only where gradients are computed), after the hooks have
    run: nothing is cached, so every token after the first would be read without its past.
    """
    if checkpointing_keeps_caches() and not torch.is_grad_enabled():
        return
    if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in text_model.layers):
        raise ValueError(
            "A TrimmedCache was given to a model in training mode with gradient checkpointing, in which transformers passes no "
            "cache to the layers. Call model.eval() before generating, and model.train() to go on training."
        )


def before_model(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the models around the layers: say what cannot work before the vision tower runs."""
    if torch.compiler.is_compiling():
        return
    if not isinstance(cache_of(kwargs), HeldCache):
        _check_names(kwargs)
    elif model.training:
        # Walking through the modules costs more than the rest of the hooks: only where training makes it needful.
        check_layers_get_caches(find_text_model(model))


def read_pictures(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of an `MllamaModel`: give it encoded pictures, or let the vision tower read a few at a time."""
    cache, pixel_values = cache_of(kwargs), kwargs.get("pixel_values")
    if not isinstance(cache, HeldCache):
        return None
    if cache.encoded is not None:
        return args, _with_encoded(model, cache, cache.encoded, args, kwargs)
    if pixel_values is None or kwargs.get("cross_attention_states") is not None:
        return None
    at_a_time = pictures_at_a_time(cache.config, model.config.vision_config)
    ids, mask = kwargs.get("aspect_ratio_ids"), kwargs.get("aspect_ratio_mask")
    share = cache.config.tower_share
    if pixel_values.ndim != 6 or ids is None:
        return None  # transformers' own error
    if share is None and pixel_values.shape[0] * pixel_values.shape[1] <= at_a_time:
        return None  # transformers' own way
    states = visual_states(model, pixel_values, ids, mask, at_a_time, share)
    return args, {**kwargs, "pixel_values": None, "cross_attention_states": states}


def read_padding(text_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an `MllamaTextModel`: note which rows are padding. Its layers get a mask that does not tell."""
    cache = cache_of(kwargs)
    if not isinstance(cache, HeldCache):
        return
    given = _by_name(text_model, args, kwargs)
    text = given.get("input_ids")
    rows = (given["inputs_embeds"] if text is None else text).shape[1]
    if given.get("cross_attention_states") is None and (rows == 1 or cache.tokens is None):
        return  # decoding, which must stay free of anything that a compiled graph could not hold, or text alone
    cache.padding = padding_of(given.get("attention_mask"), int(cache.get_seq_length()), rows)


def _by_name(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments by their names, however they were given."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _with_encoded(
    model: Any, cache: HeldCache, samples: list[EncodedSample], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    text = args[0] if args else kwargs.get("input_ids")
    text = kwargs["inputs_embeds"] if text is None else text
    if kwargs.get("pixel_values") is not None or kwargs.get("cross_attention_states") is not None:
        raise ValueError(ENCODED_AND_PIXELS)
    if len(samples) != len(text):
        raise ValueError(
            f"This TrimmedCache was given encoded pictures of {len(samples)} samples, but the forward has {len(text)}. "
            "Give one entry of pictures for every sample."
        )
    cache.reading = EncodedBatch.of(samples, text.device, model.dtype)
    return {**kwargs, "cross_attention_states": cache.reading.states}


def before_layer(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook: hand the layer its visual states and mask."""
    cache = cache_of(kwargs)
    if not isinstance(cache, HeldCache):
        if CACHE not in kwargs:
            _check_names_within(layer, args, kwargs)
        return None
    first, hidden_states = layer.layer_idx == cache.cross_layers[0], _hidden_states(args, kwargs)
    if kwargs["cross_attention_states"] is None and cache.tokens is not None and hidden_states.shape[1] == 1:
        # Decoding. Kept free of anything that a compiled graph could not hold: checks are for eager steps alone.
        if first and not torch.compiler.is_compiling():
            _check_cache(layer, cache, hidden_states)
        return args, {**kwargs, "cross_attention_mask": cache.tokens.decode_mask}
    if first:
        cache.step = _begin(layer, cache, hidden_states, kwargs)
    if cache.step is None:
        raise RuntimeError(
            "A cross-attention layer ran before the first one: trim_plugin cannot follow this model's order."
        )
    states, mask = cache.step.before(first)
    cache.layers[layer.layer_idx].expected = states is not None
    return args, {**kwargs, "cross_attention_states": states, "cross_attention_mask": mask}


def after_layer(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook: trim what the layer has cached."""
    cache = cache_of(kwargs)
    if not isinstance(cache, HeldCache):
        return
    if cache.step is not None:
        cache.step.after(layer, _hidden_states(args, kwargs))
    cache.layers[layer.layer_idx].release()
    if cache.step is not None and layer.layer_idx == cache.cross_layers[-1]:
        cache.step.finish()
        cache.step = cache.encoded = None
        cache.unfinished = False


def _check_names(kwargs: dict[str, Any]) -> None:
    """Raise `TypeError` if a trimmed cache is among arguments by a name that this transformers passes on without looking."""
    wrong = [name for name, value in kwargs.items() if isinstance(value, HeldCache)]
    if wrong:
        raise TypeError(
            f"A TrimmedCache was given as {wrong[0]}=, which transformers {transformers.__version__} ignores. "
            f"Give it as {CACHE}=."
        )


def _check_names_within(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `UnsupportedTransformersError` if the model hands its layers a trimmed cache otherwise than by its name."""
    if any(isinstance(value, HeldCache) for value in (*args, *kwargs.values())):
        raise unsupported([f"a call of {type(layer).__name__} with {CACHE}="])


def _check_cache(layer: Any, cache: HeldCache, hidden_states: torch.Tensor) -> None:
    """Raise `ValueError` unless the cache is this model's, whole, and of this batch size."""
    if not cache.belongs_to(layer):
        raise ValueError(
            "This TrimmedCache was made for another model. Make one for this model: TrimmedCache(model, ...)."
        )
    cache.check_finished()
    batch, tokens = hidden_states.shape[0], cache.tokens
    if tokens is not None and len(tokens.index) != batch:
        raise ValueError(
            f"This TrimmedCache holds {len(tokens.index)} samples, but the forward has {batch}. Make a new cache, or bring "
            "this one to the batch size with batch_repeat_interleave or batch_select_indices."
        )


def _begin(layer: Any, cache: HeldCache, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> Step:
    _check_cache(layer, cache, hidden_states)
    states, mask = kwargs["cross_attention_states"], kwargs["cross_attention_mask"]
    open_rows = kwargs["full_text_row_masked_out_mask"]
    padding, cache.padding = cache.padding, None
    # From here to `after_layer` of the last layer a failure leaves a cache that is neither old nor new.
    cache.unfinished = True
    if states is not None:
        if cache.sources.shared:
            cache.unshare()
        states = states.reshape(len(hidden_states), -1, states.shape[-1])
        read, cache.reading = cache.reading, None
        new = EncodedBatch.of_states(states) if read is None else dataclasses.replace(read, states=states)
        return Prefill(cache, new, mask, open_rows, padding, hidden_states)
    if cache.tokens is None:
        raise ValueError("No picture was given, and this TrimmedCache holds none.")
    return Reading(cache, cache.tokens, mask, open_rows, padding, hidden_states)


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _crosses(text_model: Any) -> bool:
    return 0 < len(_cross_layers(text_model)) < len(text_model.layers)


def _cross_layers(text_model: Any) -> list[Any]:
    return [layer for layer in text_model.layers if isinstance(layer, MllamaCrossAttentionDecoderLayer)]


def _whole_models(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, MllamaModel | MllamaTextModel)]


def _remove(hooks: dict[int, Callable[..., Any]], with_kwargs: dict[int, bool], own: Callable[..., Any]) -> None:
    # torch offers removal only by the handle; a deep-copied model has the hooks but nobody holds its handles.
    for key in [key for key, hook in hooks.items() if hook is own]:
        del hooks[key]
        with_kwargs.pop(key, None)
