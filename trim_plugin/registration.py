"""Makes `generate(cache_implementation="trimmed")` known to transformers."""

from __future__ import annotations

import functools
from typing import Any

from transformers.generation import configuration_utils
from transformers.generation.utils import GenerationMixin

from trim_plugin.cache import TrimmedCache
from trim_plugin.config import TrimConfig

NAME = "trimmed"


def register() -> None:
    """Register `cache_implementation="trimmed"`. Importing trim_plugin does it; doing it again changes nothing.

    Two places of transformers are touched: the tuple of names that `GenerationConfig.validate` allows, and
    `GenerationMixin._prepare_cache_for_generation`, which makes the cache. Every other name passes through.

    Example:
        >>> register()
        >>> "trimmed" in configuration_utils.ALL_CACHE_IMPLEMENTATIONS
        True
    """
    if is_registered():
        return
    configuration_utils.ALL_CACHE_IMPLEMENTATIONS = (*configuration_utils.ALL_CACHE_IMPLEMENTATIONS, NAME)
    original = GenerationMixin._prepare_cache_for_generation

    @functools.wraps(original)
    def prepare_cache(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        own = generation_config.cache_implementation == NAME and generation_config.use_cache is not False
        if not own or model_kwargs.get("past_key_values") is not None:
            return original(self, generation_config, model_kwargs, *args, **kwargs)
        model_kwargs["past_key_values"] = TrimmedCache(self, TrimConfig.of(generation_config.cache_config))
        return None

    prepare_cache._trim_plugin_original = original  # type: ignore[attr-defined]
    GenerationMixin._prepare_cache_for_generation = prepare_cache


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
    GenerationMixin._prepare_cache_for_generation = GenerationMixin._prepare_cache_for_generation._trim_plugin_original


def is_registered() -> bool:
    """Whether `cache_implementation="trimmed"` is known to transformers now."""
    return hasattr(GenerationMixin._prepare_cache_for_generation, "_trim_plugin_original")
