"""A batch read in micro-batches: a cache for each, and what they hold put together, layer by layer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import DynamicLayer

from trim_plugin.cache.held import HalfDone, HeldCache
from trim_plugin.cache.stores import padded_join


def can_part(cache: HeldCache) -> bool:
    """Whether a batch can be read in parts: not with transformers' quantized layers, nor on top of a static cache's text."""
    if cache.config.self_kv_quantization is not None:
        return False
    return not (cache.config.static and int(cache.get_seq_length()) > 0)


def part_of(cache: HeldCache, samples: slice) -> HeldCache:
    """A cache for some samples of a batch: a new one, or with what the cache holds of them if it holds a conversation.

    Its layers grow as needed, also where the whole cache's are static; `join` moves what they hold.

    Args:
        cache: the whole batch's, every sample with a source of its own; stays as it is. `can_part(cache)` is true.
        samples: which samples, counted as the cache holds them.
    """
    part = copy.copy(cache)
    part.config = dataclasses.replace(cache.config, static=False)
    part.layers = part.new_layers(part.config)
    part.turn = part.kept = None
    if cache.batch_size <= 0:
        return part
    for index in cache.self_layers:
        old, new = cache.layers[index], part.layers[index]
        new.lazy_initialization(old.keys, old.values)
        new.keys, new.values = old.keys[samples], old.values[samples]
    if cache.kept is not None:
        own = range(cache.kept.sources)[samples]
        part.regroup([cache], [(0, source) for source in own], range(len(own)))
    return part


def join(cache: HeldCache, parts: Sequence[HeldCache], copies: int = 1) -> None:
    """Let a cache hold what its parts hold, in their order. The parts are emptied layer by layer on the way.

    Args:
        cache: the whole batch's; what it held before is replaced.
        parts: made by `part_of`, each filled by a forward.
        copies: how often every sample stands in the batch. Text is repeated, pictures are held once.
    """
    cache.turn = HalfDone()
    for index in cache.self_layers:
        own = [part.layers[index] for part in parts]
        for part in parts:
            part.layers[index] = None
        _join_text(cache.layers[index], own, copies)
    filled = [part for part in parts if part.kept is not None]
    sources = [(number, source) for number, part in enumerate(filled) for source in range(part.kept.sources)]
    if sources:
        order = [source for source in range(len(sources)) for _ in range(copies)]
        cache.regroup(filled, sources, order, empty=True)
    cache.turn = None


def _join_text(layer: Any, parts: Sequence[Any], copies: int) -> None:
    """Fill a self-attention layer, transformers' dynamic or static one, with the text of all parts."""
    joined = (
        padded_join(tensors, tensors[0].shape[2], dim=2)
        for tensors in ([part.keys for part in parts], [part.values for part in parts])
    )
    keys, values = (tensor.repeat_interleave(copies, dim=0) if copies > 1 else tensor for tensor in joined)
    if isinstance(layer, DynamicLayer):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    else:
        layer.update(keys, values)
