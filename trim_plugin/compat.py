"""Everything that depends on the version of transformers.

Supported: transformers 5.17 – 5.x. Differences that matter here:

* 5.24 calls the cache `cache`, as an argument and as an output's field; before it is `past_key_values` (`CACHE`, `cache_of`).
* 5.17 asks `Cache.get_seq_length(i)` of a cross-attention layer whether it is empty, later versions look at
  `layers[i].keys` (`_has_cached_cross_attention_states`). `TrimmedCache` answers both.
* 5.17 hands `generate` the caller's own `cache_config` dict, later versions a deep copy. It is never changed here.
* 5.17 extends `cross_attention_mask` by one row a step and indexes it by position, later versions cut it to the rows at hand
  (`slices_mask_rows`): without that, assisted decoding with pictures is impossible.
* 5.17's `reset` zeroes a dynamic layer but keeps its length. `TrimmedCache.reset` empties it.
* Later versions of transformers' server have handlers more (`transformers_server`); 5.17 knows `max_tokens` alone.
* 5.17 slices a plain forward's `cross_attention_mask` after inverting it; the hooks see the same rows either way.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from typing import Any

from packaging.version import Version

#: What layers, models and `generate` call the cache that they take and return.
CACHE = "cache" if Version(importlib.metadata.version("transformers")) >= Version("5.24.0.dev0") else "past_key_values"

OLDEST = "5.17"
FIRST_UNSUPPORTED = "6"


def require_supported_transformers(version: str | None = None) -> None:
    """Raise `ImportError` if `version` of transformers, by default the installed one, is outside the supported range.

    Example:
        >>> require_supported_transformers("5.23.0")
        >>> require_supported_transformers("4.57.1")
        Traceback (most recent call last):
        ...
        ImportError: trim_plugin hooks into transformers 5.17 up to (not including) 6, but 4.57.1 is installed. ...
    """
    version = version or importlib.metadata.version("transformers")
    found = Version(version)
    if not Version(OLDEST) <= Version(found.base_version) < Version(FIRST_UNSUPPORTED):
        raise ImportError(
            f"trim_plugin hooks into transformers {OLDEST} up to (not including) {FIRST_UNSUPPORTED}, but {version} "
            f"is installed. Install a supported one: pip install 'transformers>={OLDEST},<{FIRST_UNSUPPORTED}'."
        )


def cache_of(named: Any) -> Any:
    """The cache among arguments or an output's fields, by the installed transformers' name or by the older one; None if none.

    Models take the older name until transformers 5.40, and their pre-hooks see it as the caller wrote it.

    Example:
        >>> cache_of({"past_key_values": 1}), cache_of({CACHE: 2}), cache_of({})
        (1, 2, None)
    """
    found = named.get(CACHE)
    return named.get("past_key_values") if found is None else found


@functools.cache
def slices_mask_rows() -> bool:
    """Whether `generate` cuts `cross_attention_mask` to the rows of each forward, as many as there are.

    Example:
        >>> slices_mask_rows() in (True, False)
        True
    """
    from transformers import MllamaForConditionalGeneration

    prepare = MllamaForConditionalGeneration.prepare_inputs_for_generation
    return "next_sequence_length" in inspect.signature(prepare).parameters


@functools.cache
def compiles_mllama_decoding() -> bool:
    """Whether `generate` may compile Mllama's decoding.

    Later versions keep the shapes of a decoding step; in 5.17 the cross-attention mask grows with the text. There a static cache
    works uncompiled: `generate` is told so by its configuration, not by the cache. A static cache that did not call itself
    compilable would get no mask for a prompt of one token, and read the empty rest of its buffers.

    Example:
        >>> compiles_mllama_decoding() in (True, False)
        True
    """
    from transformers import MllamaForConditionalGeneration

    return "_prepare_static_cache" in vars(MllamaForConditionalGeneration)


def transformers_server(model: Any, processor: Any, name: str) -> Any:
    """The FastAPI application of `transformers serve` for a model that is loaded already. Chats alone are answered.

    Upstream: `transformers.cli.serving.server.build_server`, whose handlers have become more; `Serve` in `transformers.cli.serve`
    loads models itself.

    Args:
        model: the model.
        processor: its processor.
        name: what requests call it.
    """
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState, Modality

    class OneModel(ModelManager):
        """Loads nothing and unloads nothing."""

        def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
            return model, processor

        def get_model_modality(self, *_: Any, **__: Any) -> Any:
            return Modality.VLM

        def get_gen_models(self, *_: Any, **__: Any) -> list[dict[str, Any]]:
            return [{"id": name, "object": "model", "created": 0, "owned_by": "trim-plugin"}]

        def shutdown(self) -> None:
            pass

    manager = OneModel()
    manager.force_model = name
    state = GenerationState()
    others = {
        parameter: None for parameter in inspect.signature(build_server).parameters if parameter.endswith("_handler")
    }
    return build_server(
        manager,
        **{**others, "chat_handler": ChatCompletionHandler(manager, state)},
        generation_state=state,
    )
