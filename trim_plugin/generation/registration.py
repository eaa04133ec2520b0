"""Makes `generate(cache_implementation="trimmed")` known to transformers."""

from __future__ import annotations

import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from trim_plugin.compat import CACHE, UnsupportedTransformersError, unsupported
from trim_plugin.contract import CONFIGURATION as _NAMES_IN
from trim_plugin.contract import MIXIN as _MIXIN_IN
from trim_plugin.contract import check_contract, check_generation
from trim_plugin.deferred import when_imported
from trim_plugin.generation.saving import writing_json, writing_json_file

NAME = "trimmed"
#: Takes a method, returns its replacement.
_Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
_wanted = False
#: Held while methods are wrapped or unwrapped: two threads would each find one unwrapped, and wrap it twice. Nothing is imported
#: within it, since an import that waits for it may be what another thread waits for.
_changing = threading.Lock()
#: Text tokens of the longest static cache that each model has had: a shorter generation takes as long a one, so that it reuses
#: the compiled graph. Stock keeps this number on the model.
_longest: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def register() -> None:
    """Register `cache_implementation="trimmed"`. Importing trim_plugin does it; doing it again changes nothing.

    Six places of transformers are touched, at once or as soon as it loads them: the tuple of names that
    `GenerationConfig.validate` allows, its `to_json_string` and `to_json_file`, which write settings with rules in them, and of
    `GenerationMixin` `_prepare_cache_for_generation`, which makes the cache, `_prefill`, which reads the prompts, and
    `_get_candidate_generator`, which makes the helper of assisted decoding. For every other cache they do what they did.

    Raises:
        UnsupportedTransformersError: transformers is loaded and lacks what shall be wrapped (`trim_plugin.contract`); nothing is
            touched. If it is loaded later, that works, a warning says so, and asking for a trimmed cache raises.

    Example:
        >>> from transformers.generation import configuration_utils
        >>> register()
        >>> "trimmed" in configuration_utils.ALL_CACHE_IMPLEMENTATIONS
        True
    """
    global _wanted
    if _wanted:
        return
    if _MIXIN_IN in sys.modules:
        check_generation()
    _wanted = True
    when_imported(_NAMES_IN, _allow_name)
    when_imported(_NAMES_IN, _wrap_configuration)
    when_imported(_MIXIN_IN, _wrap_methods)


def unregister() -> None:
    """Take `register()` back. Hooks on models stay, inert; `trim_plugin.detach(model)` removes those.

    Example:
        >>> from transformers.generation import configuration_utils
        >>> unregister()
        >>> "trimmed" in configuration_utils.ALL_CACHE_IMPLEMENTATIONS
        False
        >>> register()
    """
    global _wanted
    with _changing:
        _wanted = False
        _longest.clear()
        if _NAMES_IN in sys.modules:
            module = sys.modules[_NAMES_IN]
            names = module.ALL_CACHE_IMPLEMENTATIONS
            module.ALL_CACHE_IMPLEMENTATIONS = tuple(name for name in names if name != NAME)  # type: ignore[attr-defined]
        _unwrap(_NAMES_IN, "GenerationConfig", _CONFIGURATION_WRAPPERS)
        _unwrap(_MIXIN_IN, "GenerationMixin", (*_WRAPPERS, "generate"))


def _allow_name() -> None:
    module = sys.modules[_NAMES_IN]
    with _changing:
        names = getattr(module, "ALL_CACHE_IMPLEMENTATIONS", None)
        if _wanted and isinstance(names, tuple) and NAME not in names:
            module.ALL_CACHE_IMPLEMENTATIONS = (*names, NAME)  # type: ignore[attr-defined]


def _wrap_configuration() -> None:
    if _wanted:
        _wrap(_NAMES_IN, "GenerationConfig", _CONFIGURATION_WRAPPERS)


def _wrap_methods() -> None:
    if not _wanted:
        return
    wrappers = _WRAPPERS
    try:
        check_generation()
    except UnsupportedTransformersError as error:
        # Not raised: this runs within somebody's import of transformers, who may not want a trimmed cache at all.
        warnings.warn(f"{error} Generations with a trimmed cache are refused.", UserWarning, stacklevel=2)
        wrappers = {"generate": functools.partial(_refusing, str(error))}
    _wrap(_MIXIN_IN, "GenerationMixin", wrappers)


def _wrap(module: str, name: str, wrappers: dict[str, _Wrapper]) -> None:
    owner = getattr(sys.modules[module], name, None)
    with _changing:
        for method, wrap in wrappers.items() if _wanted else ():
            original = getattr(owner, method, None)
            if original is not None and not hasattr(original, "_trim_plugin_original"):
                wrapped: Any = functools.wraps(original)(wrap(original))
                wrapped._trim_plugin_original = original
                setattr(owner, method, wrapped)


def _unwrap(module: str, name: str, methods: Iterable[str]) -> None:
    owner = getattr(sys.modules.get(module), name, None)
    for method in methods:
        original = getattr(getattr(owner, method, None), "_trim_plugin_original", None)
        if original is not None:
            setattr(owner, method, original)


def _refusing(message: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """`generate` where the other methods cannot be wrapped: without them "trimmed" would trim nothing, and say nothing."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or self.generation_config
        if NAME in (kwargs.get("cache_implementation"), getattr(config, "cache_implementation", None)):
            raise UnsupportedTransformersError(message)
        return original(self, *args, **kwargs)

    return generate


def _is_trimmed(cache: Any) -> bool:
    """Whether this is a `TrimmedCache`, without loading what that needs: where it was never loaded, nobody has made one."""
    module = sys.modules.get("trim_plugin.forward.hooks")
    return module is not None and isinstance(cache, module.TrimmedCache)


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
        given = model_kwargs.get(CACHE)
        own = generation_config.cache_implementation == NAME and generation_config.use_cache is not False
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        batch = batch_size * copies
        if not (own and given is None) and not _is_trimmed(given):
            return original(
                self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
            )
        check_contract()  # before the import: what is missing would else show as one that fails
        # Loaded where a trimmed generation begins: importing the package shall cost nothing.
        from trim_plugin.compat import compiles_mllama_decoding
        from trim_plugin.forward.hooks import TrimmedCache
        from trim_plugin.generation.checks import check_chunks, check_inputs, check_mode, check_reuse

        check_mode(self)
        if not compiles_mllama_decoding():
            generation_config.disable_compile = True
        if own and given is None:
            length = max(max_cache_length, generation_config.max_cache_len or 0, _longest.get(self, 0))
            cache = TrimmedCache(self, generation_config.cache_config, max_cache_len=length)
            check_inputs(self, cache, model_kwargs, batch, copies)
            check_chunks(cache, model_kwargs, generation_config.prefill_chunk_size)
            model_kwargs[CACHE] = cache
            if cache.config.static:
                _longest[self] = max(length, cache.config.max_cache_len or 0)
            return None
        result = original(
            self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
        )
        # An assistant's inputs are transformers' own doing: pictures that it drops, masks that it leaves to be extended.
        if given is not None and not generation_config.is_assistant:
            check_reuse(self, given, batch, max_cache_length)
            check_inputs(self, given, model_kwargs, batch, copies)
            check_chunks(given, model_kwargs, generation_config.prefill_chunk_size)
        return result

    return prepare_cache


def _reading_prompts(original: Callable[..., Any]) -> Callable[..., Any]:
    def prefill(
        self: Any, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        cache = model_kwargs.get(CACHE)
        if cache is None or not _is_trimmed(cache):
            if generation_config.cache_implementation == NAME and generation_config.use_cache is not False:
                # What makes the cache was replaced after it had been wrapped, or by the model's class.
                raise unsupported([f"trim_plugin's _prepare_cache_for_generation on {type(self).__name__}"])
            return original(self, input_ids, generation_config, model_kwargs, *args, **kwargs)
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        if len(input_ids) == copies == 1:  # nothing to cut
            return original(self, input_ids, generation_config, model_kwargs, *args, **kwargs)
        from trim_plugin.generation.micro_batches import prefill_of_generate

        def read(own_ids: Any, own_kwargs: dict[str, Any]) -> Any:
            return original(self, own_ids, generation_config, own_kwargs, *args, **kwargs)

        # From 5.23 on, `generate` leaves out a mask that hides nothing, and notes how long it was.
        mask_length = getattr(generation_config, "_mask_length", -1)
        return prefill_of_generate(self, cache, copies, input_ids, model_kwargs, read, mask_length)

    return prefill


def _making_candidates(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_candidate_generator(self: Any, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        cache = model_kwargs.get(CACHE)
        if cache is None or not _is_trimmed(cache):
            return original(self, *args, model_kwargs=model_kwargs, **kwargs)
        from trim_plugin.generation.assisted import adapt, check_supported

        check_supported(cache, model_kwargs)
        generator = original(self, *args, model_kwargs=model_kwargs, **kwargs)
        adapt(generator, self, cache, kwargs["input_ids"])
        return generator

    return get_candidate_generator


_WRAPPERS: dict[str, _Wrapper] = {
    "_prepare_cache_for_generation": _preparing_caches,
    "_prefill": _reading_prompts,
    "_get_candidate_generator": _making_candidates,
}
_CONFIGURATION_WRAPPERS: dict[str, _Wrapper] = {"to_json_string": writing_json, "to_json_file": writing_json_file}
