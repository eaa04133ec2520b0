"""Everything that depends on the version of transformers.

Supported: transformers 5.17 – 5.x. Differences that matter here:

* 5.17 asks `Cache.get_seq_length(i)` of a cross-attention layer whether it is empty, later versions look at
  `layers[i].keys` (`_has_cached_cross_attention_states`). `TrimmedCache` answers both.
* 5.17 hands `generate` the caller's own `cache_config` dict, later versions a deep copy. It is never changed here.
* 5.17 extends `cross_attention_mask` by one row a step and indexes it by position, later versions cut it to the rows at hand
  (`slices_mask_rows`): without that, assisted decoding with pictures is impossible.
* 5.17's `reset` zeroes a dynamic layer but keeps its length. `TrimmedCache.reset` empties it.
* 5.17 slices a plain forward's `cross_attention_mask` after inverting it; the hooks see the same rows either way.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect

from packaging.version import Version

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
    works uncompiled.

    Example:
        >>> compiles_mllama_decoding() in (True, False)
        True
    """
    from transformers import MllamaForConditionalGeneration

    return "_prepare_static_cache" in vars(MllamaForConditionalGeneration)
