"""Makes `generate(cache_implementation="trimmed")` known to transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers.generation import configuration_utils
from transformers.generation.utils import GenerationMixin

from trim_plugin.config import TrimConfig
from trim_plugin.forward.trimmed_cache import TrimmedCache
from trim_plugin.generation.assisted import adapt, check_supported
from trim_plugin.generation.checks import check_chunks, check_inputs, check_reuse

NAME = "trimmed"


def register() -> None:
    """Register `cache_implementation="trimmed"`. Importing trim_plugin does it; doing it again changes nothing.

    Three places of transformers are touched: the tuple of names that `GenerationConfig.validate` allows,
    `GenerationMixin._prepare_cache_for_generation`, which makes the cache, and `GenerationMixin._get_candidate_generator`,
    which makes the helper of assisted decoding. For every other cache they do what they did.

    Example:
        >>> register()
        >>> "trimmed" in configuration_utils.ALL_CACHE_IMPLEMENTATIONS
        True
    """
    if is_registered():
        return
    configuration_utils.ALL_CACHE_IMPLEMENTATIONS = (*configuration_utils.ALL_CACHE_IMPLEMENTATIONS, NAME)
    for name, wrap in _WRAPPERS.items():
        original = getattr(GenerationMixin, name)
        wrapped: Any = functools.wraps(original)(wrap(original))
        wrapped._trim_plugin_original = original
        setattr(GenerationMixin, name, wrapped)


def unregister() -> None:
    """Take `register()` back. Hooks on models stay, inert; `trim_plugin.detach(model)` removes those.

    Example:
        >>> unregister()
        >>> "trimmed" in configuration_utils.ALL_CACHE_IMPLEMENTATIONS
        False
        >>> register()
    """
    if not is_registered():
        return
    names = configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    configuration_utils.ALL_CACHE_IMPLEMENTATIONS = tuple(name for name in names if name != NAME)
    for name in _WRAPPERS:
        setattr(GenerationMixin, name, getattr(GenerationMixin, name)._trim_plugin_original)


def is_registered() -> bool:
    """Whether `cache_implementation="trimmed"` is known to transformers now."""
    return all(hasattr(getattr(GenerationMixin, name), "_trim_plugin_original") for name in _WRAPPERS)


def _preparing_caches(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_cache(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        given = model_kwargs.get("past_key_values")
        own = generation_config.cache_implementation == NAME and generation_config.use_cache is not False
        batch = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        if own and given is None:
            length = max(max_cache_length, generation_config.max_cache_len or 0)
            cache = TrimmedCache(self, TrimConfig.of(generation_config.cache_config), max_cache_len=length)
            check_inputs(self, cache, model_kwargs, batch)
            check_chunks(cache, model_kwargs, generation_config.prefill_chunk_size)
            model_kwargs["past_key_values"] = cache
            return None
        result = original(
            self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
        )
        # An assistant's inputs are transformers' own doing: pictures that it drops, masks that it leaves to be extended.
        if isinstance(given, TrimmedCache) and not generation_config.is_assistant:
            check_reuse(self, given, batch)
            check_inputs(self, given, model_kwargs, batch)
            check_chunks(given, model_kwargs, generation_config.prefill_chunk_size)
        return result

    return prepare_cache


def _making_candidates(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_candidate_generator(self: Any, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, TrimmedCache):
            return original(self, *args, model_kwargs=model_kwargs, **kwargs)
        check_supported(cache, model_kwargs)
        generator = original(self, *args, model_kwargs=model_kwargs, **kwargs)
        adapt(generator, self, cache, kwargs["input_ids"])
        return generator

    return get_candidate_generator


_WRAPPERS = {
    "_prepare_cache_for_generation": _preparing_caches,
    "_get_candidate_generator": _making_candidates,
}
