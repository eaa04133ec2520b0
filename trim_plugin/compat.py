"""Everything that depends on the version of transformers.

Supported: transformers 5.17 – 5.24, what was tested. A newer one is tried, with a warning, and works as long as it holds the
contract (`trim_plugin.contract`). Differences that matter here:

* 5.24 calls the cache `cache`, as an argument and as an output's field; before it is `past_key_values` (`CACHE`, `cache_of`).
  The older name is an alias until 5.40. Forwards take it by a wrapper that warns (`deprecate_kwarg`); outputs log it.
* 5.24 returns what the vision tower yielded as `image_outputs` of a forward (`Multimodal...Output`). A prompt read in
  micro-batches leaves it out: holding the tower's output of each would cost what they save.
* 5.24 crops static self-attention layers and allows assisted decoding with them. Here it is refused in every version.
* 5.24 keeps the cache in training mode with gradient checkpointing, unless gradients are computed; before, it is dropped
  (`checkpointing_keeps_caches`).
* 5.24's layers have no `dtype` any more: the tensors that they hold say it.
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
import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.version import Version

#: The oldest and the newest release series whose tests pass (`constraints-oldest.txt`, `constraints.txt`), and the first after.
OLDEST, NEWEST, FIRST_UNTESTED = "5.17", "5.24", "5.25"


class UnsupportedTransformersError(ImportError):
    """The installed transformers lacks something that trim_plugin hooks into; the message says which versions have it."""


def unsupported(missing: Iterable[str]) -> UnsupportedTransformersError:
    """The error that names what the installed transformers does not have.

    Example:
        >>> print(unsupported(["GenerationMixin._prefill"]))
        trim_plugin cannot hook into transformers ..., in which it did not find: GenerationMixin._prefill. Supported is ...
    """
    version = importlib.metadata.version("transformers")
    remedy = f"Install one of these: pip install 'transformers>={OLDEST},<{FIRST_UNTESTED}'."
    if Version(OLDEST) <= Version(version) < Version(FIRST_UNTESTED):
        remedy = f"{version} is one of these as released: something in this installation or program has changed it."
    return UnsupportedTransformersError(
        f"trim_plugin cannot hook into transformers {version}, in which it did not find: {'; '.join(missing)}. "
        f"Supported is transformers {OLDEST} to {NEWEST}. {remedy}"
    )


def require_supported_transformers(version: str | None = None) -> None:
    """Raise if `version` of transformers, by default the installed one, is too old; warn once if it is newer than the tested.

    Raises:
        UnsupportedTransformersError: it is older than the oldest supported version; an `ImportError`.

    Example:
        >>> require_supported_transformers("5.23.0")
        >>> require_supported_transformers("4.57.1")
        Traceback (most recent call last):
        ...
        trim_plugin.compat.UnsupportedTransformersError: trim_plugin hooks into transformers 5.17 to 5.24, but 4.57.1 is ...
    """
    version = version or importlib.metadata.version("transformers")
    base = Version(Version(version).base_version)
    if base < Version(OLDEST):
        raise UnsupportedTransformersError(
            f"trim_plugin hooks into transformers {OLDEST} to {NEWEST}, but {version} is installed. Install a supported one: "
            f"pip install 'transformers>={OLDEST},<{FIRST_UNTESTED}'."
        )
    if base >= Version(FIRST_UNTESTED):
        _warn_untested(version)


@functools.cache
def _warn_untested(version: str) -> None:
    warnings.warn(
        f"trim_plugin was tested with transformers {OLDEST} to {NEWEST}, and {version} is installed. What it hooks into is "
        "checked before it is used; compare a few answers with stock transformers before relying on the rest.",
        UserWarning,
        stacklevel=3,
    )


def _name_of_the_cache() -> str:
    """What the installed transformers' layers call their cache, read in their source: importing them would take seconds.

    `trim_plugin.contract` compares it with what was imported. Where there is no source to read, the version decides.
    """
    spec = importlib.util.find_spec("transformers")
    for folder in (spec and spec.submodule_search_locations) or ():
        source = Path(folder, "models", "mllama", "modeling_mllama.py")
        if source.is_file():
            text = source.read_text(encoding="utf-8")
            layer = re.search(r"class MllamaCrossAttentionDecoderLayer\b.*?def forward\((.*?)\)\s*->", text, re.DOTALL)
            if layer is not None:
                return "cache" if re.search(r"\bcache\b", layer[1]) else "past_key_values"
    newer = Version(importlib.metadata.version("transformers")) >= Version("5.24.0.dev0")
    return "cache" if newer else "past_key_values"


#: What layers, models and `generate` call the cache that they take and return.
CACHE = _name_of_the_cache()


def cache_of(named: Any) -> Any:
    """The cache among arguments or an output's fields, by the installed transformers' name or by the older one; None if none.

    Models take the older name until transformers 5.40, and their pre-hooks see it as the caller wrote it. If both are given,
    transformers ignores the older one.

    Example:
        >>> cache_of({"past_key_values": 1}), cache_of({CACHE: 2}), cache_of({})
        (1, 2, None)
    """
    if CACHE in named:
        return named[CACHE]
    # Not by the output's own methods, which log that the older name is deprecated.
    return dict.get(named, "past_key_values")


@functools.cache
def slices_mask_rows() -> bool:
    """Whether `generate` cuts `cross_attention_mask` to the rows of each forward, as many as there are."""
    from transformers import MllamaForConditionalGeneration

    prepare = MllamaForConditionalGeneration.prepare_inputs_for_generation
    return "next_sequence_length" in inspect.signature(prepare).parameters


@functools.cache
def compiles_mllama_decoding() -> bool:
    """Whether `generate` may compile Mllama's decoding.

    Later versions keep the shapes of a decoding step; in 5.17 the cross-attention mask grows with the text. There a static cache
    works uncompiled: `generate` is told so by its configuration, not by the cache. A static cache that did not call itself
    compilable would get no mask for a prompt of one token, and read the empty rest of its buffers.
    """
    from transformers import MllamaForConditionalGeneration

    return "_prepare_static_cache" in vars(MllamaForConditionalGeneration)


@functools.cache
def checkpointing_keeps_caches() -> bool:
    """Whether layers in training mode with gradient checkpointing are given their cache where no gradients are computed."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    class Layer(GradientCheckpointingLayer):
        """Its forward is wrapped as those of all such layers are."""

        def forward(self) -> None:
            pass

    return "is_grad_enabled" in Layer.forward.__code__.co_names
