"""Splits a batch's cache into parts and joins them again: micro-batches of a prompt, or requests of a running batch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from trim_plugin.cache.held import HalfDone, HeldCache
from trim_plugin.cache.kept import KeptTokens
from trim_plugin.cache.regrouping import padded_join


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
    for index in part.cross_layers:
        part.layers[index].decodes = False
    if cache.batch_size <= 0:
        return part
    for index in cache.self_layers:
        old, new = cache.layers[index], part.layers[index]
        _put(new, old.keys[samples], old.values[samples])
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
        _put(layer, keys, values)
    else:
        layer.update(keys, values)


def _put(layer: DynamicLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Let a growing layer hold these tensors themselves; `update` would copy them."""
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


def join_running(running: HeldCache, part: HeldCache) -> tuple[int, int]:
    """Let a running batch go on together with another one, whose samples stand behind its own. The other one is emptied.

    Texts of unequal length are padded at the left, with zeros that an attention mask has to hide.

    Args:
        running: growing layers, with a text or new.
        part: growing layers, with a text.

    Returns:
        By how many positions the texts of the running batch, and of the other one, are padded.

    Example:
        >>> from trim_plugin import TrimmedCache
        >>> from trim_plugin.embedded import ask, load_small_model
        >>> model, processor = load_small_model()
        >>> batch = [TrimmedCache(model) for _ in range(2)]
        >>> for cache in batch:
        ...     _ = model(**ask(processor), cache=cache)
        >>> join_running(*batch), batch[0].batch_size
        ((0, 0), 2)
    """
    lengths = [max(0, int(cache.get_seq_length())) if cache.batch_size > 0 else 0 for cache in (running, part)]
    longest = max(lengths)
    padding = (longest - lengths[0], longest - lengths[1])
    before, batch = max(0, running.batch_size), part.batch_size
    _join_pictures(running, part, before, batch)
    for index in running.self_layers:
        own, other = running.layers[index], part.layers[index]
        if before == 0:
            _put(own, other.keys, other.values)
        else:
            own.keys, own.values = (
                torch.cat([_left_padded(mine, padding[0]), _left_padded(theirs, padding[1])])
                for mine, theirs in ((own.keys, other.keys), (own.values, other.values))
            )
        part.layers[index] = None
    return padding


def _join_pictures(running: HeldCache, part: HeldCache, before: int, batch: int) -> None:
    """What is held of pictures; samples without any stand beside those that have some."""
    if running.kept is None and part.kept is None:
        return
    for cache, other, samples in ((running, part, before), (part, running, batch)):
        if cache.kept is None and samples:
            cache.kept = KeptTokens.without_pictures(samples, other.kept)
            for index in cache.cross_layers:
                cache.layers[index].hold_nothing(cache.kept, other.layers[index])
    caches = [cache for cache in (running, part) if cache.kept is not None]
    sources = [(number, source) for number, cache in enumerate(caches) for source in range(cache.kept.sources)]
    firsts = [0, caches[0].kept.sources] if len(caches) == 2 else [0]
    order = [first + source for first, cache in zip(firsts, caches, strict=True) for source in cache.kept.order]
    running.regroup(caches, sources, order)


def _left_padded(tensor: torch.Tensor, positions: int) -> torch.Tensor:
    """(batch, heads, positions more, head_dim)."""
    return torch.nn.functional.pad(tensor, (0, 0, positions, 0)) if positions else tensor


def cut_left(cache: HeldCache, positions: int) -> None:
    """Forget the first positions of all texts, which are padding in every one."""
    for index in cache.self_layers:
        layer = cache.layers[index]
        layer.keys, layer.values = layer.keys[:, :, positions:].clone(), layer.values[:, :, positions:].clone()
