"""A forward that brings pictures: selection in the first cross-attention layer, survivors in the later ones."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from trim_plugin.attention.masks import (
    LOST_TOKENS,
    add_log_sizes,
    check_columns,
    last_row_reads,
    open_mask,
    pack,
    reads_any,
    take_columns,
)
from trim_plugin.attention.scoring import visual_token_scores
from trim_plugin.attention.visibility import group_ids, read_visibility
from trim_plugin.cache.held import HeldCache
from trim_plugin.cache.layers import CrossAttentionLayer, take_tokens
from trim_plugin.cache.tokens import CachedTokens, Storage
from trim_plugin.forward.encoded import EncodedBatch
from trim_plugin.forward.step import Step, counted_padding
from trim_plugin.rules.merging import Merging, merge_dropped
from trim_plugin.rules.selection import select

_warned_without_mask = False


class Prefill(Step):
    """Pictures come in: select in the first cross-attention layer, then go on with the survivors.

    "Columns" are what the first layer attends to: visual tokens cached in earlier turns, then the new ones.

    Args:
        cache: the cache; holds tokens already if this is not the conversation's first picture.
        new: the new pictures' visual tokens.
        mask: additive (batch, 1, rows, all visual tokens so far), or None: every row may read everything.
        open_rows: 0 for blind rows, see `masks`; or None.
        padding: bool (batch or 1, rows), True for rows that are no text; None if there are none.
        hidden_states: (batch, rows, width), what the first cross-attention decoder layer is given.

    Raises:
        ValueError: the mask does not cover the visual tokens of this and earlier turns, lets text read tokens that are gone, or a
            processor misbehaves.
    """

    def __init__(
        self,
        cache: HeldCache,
        new: EncodedBatch,
        mask: torch.Tensor | None,
        open_rows: torch.Tensor | None,
        padding: torch.Tensor | None,
        hidden_states: torch.Tensor,
    ) -> None:
        rows, states = hidden_states.shape[1], new.states
        self._cache, self._states = cache, states
        self._earlier = cache.tokens
        self._index, self._valid, self._sizes = _columns(cache.tokens, new)
        self._first_new = self._valid.shape[1] - states.shape[1]
        total = new.total + (0 if self._earlier is None else self._earlier.total)
        as_they_come = self._earlier is None and new.complete
        if mask is None:
            _warn_without_mask()
            readable = open_mask(self._valid, rows, states.dtype)
            self._reachable = torch.ones(len(states), total, dtype=torch.bool, device=states.device)
        else:
            check_columns(mask, total)
            self._reachable = last_row_reads(mask, counted_padding(cache, padding)).to(states.device)
            readable = mask if as_they_come else self._mask_of_columns(mask, open_rows, counted_padding(cache, padding))
        if self._earlier is not None:
            self._reachable[:, : self._earlier.total] &= self._earlier.reachable.to(self._reachable.device)
        self._visibility = read_visibility(readable, open_rows, padding)
        self._readable = readable
        self._before = self._sizes
        self._mask = readable if as_they_come else add_log_sizes(readable, self._sizes)
        self._sized = not as_they_come
        self._later_states, self._later_mask = self._states, self._mask
        self._token_bytes = 0
        self._bucket = cache.config.bucket
        self._decodable = self._valid
        self._positions: torch.Tensor | None = None

    def _mask_of_columns(
        self, mask: torch.Tensor, open_rows: torch.Tensor | None, padding: torch.Tensor | None
    ) -> torch.Tensor:
        """The mask over the columns, where these are not simply all visual tokens."""
        if self._earlier is not None and bool(reads_any(mask, open_rows, ~self._earlier.reachable, padding)):
            raise ValueError(LOST_TOKENS)
        return take_columns(mask, self._index, self._valid)

    def before(self, first: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """All columns for the first layer and in exact mode, the kept ones otherwise."""
        return (self._states, self._mask) if first else (self._later_states, self._later_mask)

    def after(self, layer: Any, hidden_states: torch.Tensor) -> None:
        """Select after the first layer; trim every layer's cache to what decoding can read."""
        cached = self._cache.layers[layer.layer_idx]
        if layer.layer_idx == self._cache.cross_layers[0]:
            self._token_bytes = token_bytes(cached.keys, cached.values)
            self._narrow(cached, self._choose(layer, hidden_states.to(cached.keys.device), cached.keys))
        if self._positions is None:
            cached.settle()
        else:
            cached.keep(self._positions)

    def _choose(self, layer: Any, hidden_states: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """bool (batch, columns): what survives the rule."""
        config = self._cache.config
        if config.keeps_reachable:
            return self._valid
        queries = layer_queries(layer, hidden_states)
        log_sizes = self._sizes.float().log() if self._sized else None
        scores = visual_token_scores(queries, keys, self._visibility, layer.cross_attn.scaling, log_sizes)
        kept = select(scores, self._visibility, config.processor_list, self._first_new, self._states)
        return kept.to(self._valid.device) & self._valid

    def _narrow(self, cached: CrossAttentionLayer, kept: torch.Tensor) -> None:
        """Let the columns be the kept ones from here on: in the first layer's cache, in later layers' states and mask."""
        if not torch.equal(kept, self._valid):
            new = kept[:, self._first_new :]
            positions, present = pack(new)
            merging = self._merging(new, positions, cached.keys[:, :, self._first_new :])
            earlier = torch.arange(self._first_new, device=kept.device).expand(len(kept), -1)
            columns = torch.cat([earlier, positions + self._first_new], dim=1)
            if merging is None:
                cached.keep(columns)
                self._later_states = take_tokens(self._states, positions)
                self._sizes = self._sizes.gather(1, columns)
            else:
                fresh = (tensor[:, :, self._first_new :] for tensor in (cached.keys, cached.values))
                cached.replace(self._first_new, *map(merging.mean, fresh))
                self._later_states = merging.mean(self._states)
                self._sizes = torch.cat([self._sizes[:, : self._first_new], merging.sizes], dim=1)
            self._index = self._index.gather(1, columns)
            self._valid = torch.cat([self._valid[:, : self._first_new], present], dim=1)
            self._later_mask = add_log_sizes(take_columns(self._readable, columns, self._valid), self._sizes)
        self._decodable = self._valid & self._reachable.gather(1, self._index)
        as_it_stands = self._bucket == 1 and torch.equal(self._decodable, torch.ones_like(self._decodable))
        self._positions = None if as_it_stands else pack(self._decodable, self._bucket)[0]

    def _merging(self, kept: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor) -> Merging | None:
        """What becomes of the dropped tokens of the new pictures; None if they are forgotten.

        They are compared by this layer's keys: tokens with equal keys are read with equal weights, so that merging them changes
        nothing, whatever their values. A view: a projection lays keys out token by token.
        """
        if not self._cache.config.merge:
            return None
        ids = group_ids(self._visibility.groups(self._first_new), self._valid.shape[1])
        groups = ids[:, self._first_new :].to(kept.device)
        features = keys.transpose(1, 2).flatten(2).to(kept.device)
        return merge_dropped(features, kept, groups, self._sizes[:, self._first_new :], positions)

    def finish(self) -> None:
        """Tell the cache which visual tokens its layers hold."""
        visible = (self._visibility.visible * self._before.cpu())[:, self._first_new :].sum(dim=1)
        if self._earlier is not None:
            visible += self._earlier.visible
        storage = Storage(self._token_bytes, self._states.dtype, self._bucket, self._cache.shared_heads)
        self._cache.tokens, _ = CachedTokens.choose(
            self._index, self._sizes, self._decodable, visible, self._reachable, storage
        )


def layer_queries(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The queries of a cross-attention decoder layer, (batch, heads, rows, head_dim), from what the layer was given.

    Recomputed with the layer's own modules (so LoRA, quantized and offloaded weights count), which costs about 0.1 % of an
    11B prefill and needs no state on the model. Upstream: `MllamaTextCrossAttention.forward`.
    """
    attention = layer.cross_attn
    with torch.no_grad():
        projected = attention.q_proj(layer.input_layernorm(hidden_states))
        return attention.q_norm(projected.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2))


def layer_keys(layer: Any, states: torch.Tensor) -> torch.Tensor:
    """The keys that a cross-attention decoder layer makes of visual states (batch, tokens, width).

    Returns:
        (batch, key-value heads, tokens, head_dim). Upstream: `MllamaTextCrossAttention.forward`.
    """
    attention = layer.cross_attn
    with torch.no_grad():
        projected = attention.k_proj(states)
        heads = projected.unflatten(-1, (attention.num_key_value_heads, attention.head_dim))
        return attention.k_norm(heads.transpose(1, 2))


def _columns(earlier: CachedTokens | None, new: EncodedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The visual token behind every column, whether the column is one (not padding between samples), and its size."""
    if earlier is None:
        return new.index, new.valid, new.sizes
    device = new.index.device
    return (
        torch.cat([earlier.index.to(device), new.index + earlier.total], dim=1),
        torch.cat([earlier.valid.to(device), new.valid], dim=1),
        torch.cat([earlier.sizes.to(device), new.sizes], dim=1),
    )


def token_bytes(keys: torch.Tensor, values: torch.Tensor) -> int:
    """Bytes of one visual token's keys and values in a layer, (batch, key-value heads, tokens, head_dim) each."""
    return sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in (keys, values))


def _warn_without_mask() -> None:
    global _warned_without_mask
    if not _warned_without_mask:
        _warned_without_mask = True
        warnings.warn(
            "A picture was given without cross_attention_mask: every text row may read every visual token. (Stock "
            "sdpa attention would read them causally, as if they were text.) The processor makes the mask.",
            UserWarning,
            stacklevel=2,
        )
