"""A batch read in parts: a cache for each part, and what they hold put together, layer by layer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from trim_plugin.cache.held import HeldCache
from trim_plugin.cache.layers import joined


def can_part(cache: HeldCache) -> bool:
    """Whether a batch can be read in parts: not with transformers' quantized layers, nor on top of a static cache's text."""
    if cache.config.self_kv_quantization is not None:
        return False
    return not (cache.config.static and int(cache.get_seq_length()) > 0)


def part_of(cache: HeldCache, samples: slice) -> HeldCache:
    """A cache for some samples of a batch: a new one, or with what the cache holds of them if it holds a conversation.

    Its layers grow as needed, also where the whole cache's are static; `join` moves what they hold.

    Args:
        cache: the whole batch's; stays as it is. `can_part(cache)` is true.
        samples: which samples, counted as the cache holds them.
    """
    part = copy.copy(cache)
    part.config = dataclasses.replace(cache.config, static=False)
    part.step, part.reading, part.padding, part.copies = None, None, None, 1
    part.encoded = None if cache.encoded is None else cache.encoded[samples]
    part.sources = type(cache.sources)()
    part.layers = part.new_layers(part.config)
    if cache.batch_size <= 0:
        part.tokens = None
        return part
    for index in cache.self_layers:
        old, new = cache.layers[index], part.layers[index]
        new.lazy_initialization(old.keys, old.values)
        new.keys, new.values = old.keys[samples], old.values[samples]
    if cache.tokens is not None:
        part.tokens = cache.tokens.of_samples(torch.arange(cache.batch_size)[samples])
        for index in cache.cross_layers:
            part.layers[index] = cache.layers[index].part(samples, part.sources)
    return part


def join(cache: HeldCache, parts: Sequence[HeldCache], copies: int = 1) -> None:
    """Let a cache hold what its parts hold, in their order. The parts are emptied layer by layer on the way.

    Args:
        cache: the whole batch's; what it held before is replaced.
        parts: made by `part_of`, each filled by a forward.
        copies: how often every sample stands in the batch. Text is repeated, pictures are held once.
    """
    cache.unfinished = True  # a failure from here on leaves it half joined
    cache.sources.of_sample = None
    records = [part.tokens for part in parts if part.tokens is not None]
    cache.tokens = type(records[0]).joined(records, cache.config.bucket) if records else None
    for index in range(len(cache.layers)):
        own = [part.layers[index] for part in parts]
        for part in parts:
            part.layers[index] = None
        if index in cache.self_layers:
            _join_text(cache.layers[index], own, copies)
        elif cache.tokens is not None:
            cache.layers[index].join(own, cache.tokens.index.shape[1])
    if cache.tokens is not None and copies > 1:
        batch = len(cache.tokens.index)
        cache.sources.repeat(copies, batch)
        cache.tokens = cache.tokens.of_samples(torch.arange(batch).repeat_interleave(copies))
    cache.encoded = None
    cache.unfinished = False


def _join_text(layer: Any, parts: Sequence[Any], copies: int) -> None:
    """Fill a self-attention layer, transformers' dynamic or static one, with the text of all parts."""
    keys, values = (
        joined(tensors, tensors[0].shape[2], dim=2).repeat_interleave(copies, dim=0)
        if copies > 1
        else joined(tensors, tensors[0].shape[2], dim=2)
        for tensors in ([part.keys for part in parts], [part.values for part in parts])
    )
    if isinstance(layer, DynamicLayer):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    else:
        layer.update(keys, values)
