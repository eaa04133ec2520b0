"""A forward that brings pictures: selection in the first cross-attention layer, survivors in the later ones."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from trim_plugin.attention.masks import (
    LOST_TOKENS,
    check_columns,
    last_row_reads,
    open_mask,
    pack,
    reads_any,
    take_columns,
)
from trim_plugin.attention.scoring import visual_token_scores
from trim_plugin.attention.visibility import padding_of, read_visibility
from trim_plugin.cache.held import HeldCache
from trim_plugin.cache.layers import take_tokens
from trim_plugin.cache.tokens import CachedTokens, Storage
from trim_plugin.forward.step import Step
from trim_plugin.rules.selection import select

_warned_without_mask = False


class Prefill(Step):
    """Pictures come in: select in the first cross-attention layer, then go on with the survivors.

    "Columns" are what the first layer attends to: visual tokens cached in earlier turns, then the new ones.

    Args:
        cache: the cache; holds tokens already if this is not the conversation's first picture.
        states: `cross_attention_states` of the new pictures, a multiple of `batch` rows in all.
        mask: additive (batch, 1, rows, all visual tokens so far), or None: every row may read everything.
        open_rows: 0 for blind rows, see `masks`; or None.
        causal_mask: the self-attention mask, to tell padding.
        hidden_states: (batch, rows, width), what the first cross-attention decoder layer is given.

    Raises:
        ValueError: the mask does not cover the visual tokens of this and earlier turns, lets text read tokens that are gone, or a
            processor misbehaves.
    """

    def __init__(
        self,
        cache: HeldCache,
        states: torch.Tensor,
        mask: torch.Tensor | None,
        open_rows: torch.Tensor | None,
        causal_mask: torch.Tensor | None,
        hidden_states: torch.Tensor,
    ) -> None:
        batch, rows = hidden_states.shape[:2]
        self._cache = cache
        self._states = states.reshape(batch, -1, states.shape[-1])
        self._earlier = cache.tokens
        self._index, self._valid = _columns(cache.tokens, self._states)
        self._first_new = self._valid.shape[1] - self._states.shape[1]
        total = self._states.shape[1] + (0 if self._earlier is None else self._earlier.total)
        if mask is None:
            _warn_without_mask()
            self._mask = open_mask(self._valid, rows, states.dtype)
            self._reachable = torch.ones(batch, total, dtype=torch.bool, device=states.device)
        else:
            check_columns(mask, total)
            self._reachable = last_row_reads(mask).to(states.device)
            self._mask = mask if self._earlier is None else self._mask_after(self._earlier, mask, open_rows)
        if self._earlier is not None:
            self._reachable[:, : self._earlier.total] &= self._earlier.reachable.to(self._reachable.device)
        self._visibility = read_visibility(self._mask, open_rows, padding_of(causal_mask, rows))
        self._later_states, self._later_mask = self._states, self._mask
        self._token_bytes = 0
        self._bucket = cache.config.bucket
        self._decodable = self._valid
        self._first_positions: torch.Tensor | None = None
        self._later_positions: torch.Tensor | None = None

    def _mask_after(self, earlier: CachedTokens, mask: torch.Tensor, open_rows: torch.Tensor | None) -> torch.Tensor:
        """The mask over the columns, of a turn that follows others."""
        if bool(reads_any(mask, open_rows, ~earlier.reachable)):
            raise ValueError(LOST_TOKENS)
        return take_columns(mask, self._index, self._valid)

    def before(self, first: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """All columns for the first layer and in exact mode, the kept ones otherwise."""
        return (self._states, self._mask) if first else (self._later_states, self._later_mask)

    def after(self, layer: Any, hidden_states: torch.Tensor) -> None:
        """Select after the first layer; trim every layer's cache to what decoding can read."""
        cached = self._cache.layers[layer.layer_idx]
        first = layer.layer_idx == self._cache.cross_layers[0]
        if first:
            self._token_bytes = token_bytes(cached.keys, cached.values)
            self._plan(self._choose(layer, hidden_states.to(cached.keys.device), cached.keys))
        positions = self._first_positions if first else self._later_positions
        if positions is None:
            cached.settle()
        else:
            cached.keep(positions)

    def _choose(self, layer: Any, hidden_states: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """bool (batch, columns): what survives the rule."""
        if self._cache.config.exact:
            return self._valid
        queries = layer_queries(layer, hidden_states)
        scores = visual_token_scores(queries, keys, self._visibility, layer.cross_attn.scaling)
        kept = select(scores, self._visibility, self._cache.config.processor_list, self._first_new)
        return kept.to(self._valid.device) & self._valid

    def _plan(self, kept: torch.Tensor) -> None:
        """Decide what later layers get, and what every layer's cache holds in the end."""
        self._decodable = kept & self._reachable.gather(1, self._index)
        self._first_positions = self._positions(self._decodable)
        if torch.equal(kept, self._valid):
            self._later_positions = self._first_positions
            return
        positions, valid = pack(kept[:, self._first_new :])
        columns = torch.cat([self._old_columns(), positions + self._first_new], dim=1)
        present = torch.cat([self._valid[:, : self._first_new], valid], dim=1)
        self._later_states = take_tokens(self._states, positions)
        self._later_mask = take_columns(self._mask, columns, present)
        decodable = self._decodable.gather(1, columns) & present
        # Without earlier turns the kept tokens are packed already: nothing to gather if decoding can read all of them.
        done = self._bucket == 1 and self._first_new == 0 and torch.equal(decodable, present)
        self._later_positions = None if done else self._positions(decodable)

    def _positions(self, chosen: torch.Tensor) -> torch.Tensor | None:
        """Positions to keep, or None if that is everything as it stands."""
        return None if self._bucket == 1 and bool(chosen.all()) else pack(chosen, self._bucket)[0]

    def _old_columns(self) -> torch.Tensor:
        return torch.arange(self._first_new, device=self._valid.device).expand(len(self._valid), -1)

    def finish(self) -> None:
        """Tell the cache which visual tokens its layers hold."""
        visible = self._visibility.visible[:, self._first_new :].sum(dim=1)
        if self._earlier is not None:
            visible += self._earlier.visible
        storage = Storage(self._token_bytes, self._states.dtype, self._bucket, self._cache.shared_heads)
        self._cache.tokens, _ = CachedTokens.choose(self._index, self._decodable, visible, self._reachable, storage)


def layer_queries(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The queries of a cross-attention decoder layer, (batch, heads, rows, head_dim), from what the layer was given.

    Recomputed with the layer's own modules (so LoRA, quantized and offloaded weights count), which costs about 0.1 % of an
    11B prefill and needs no state on the model. Upstream: `MllamaTextCrossAttention.forward`.
    """
    attention = layer.cross_attn
    with torch.no_grad():
        projected = attention.q_proj(layer.input_layernorm(hidden_states))
        return attention.q_norm(projected.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2))


def _columns(earlier: CachedTokens | None, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The visual token behind every column, and whether the column is one (not padding between samples)."""
    batch, new, _ = states.shape
    index = torch.arange(new, device=states.device).expand(batch, -1)
    valid = torch.ones_like(index, dtype=torch.bool)
    if earlier is None:
        return index, valid
    return (
        torch.cat([earlier.index.to(index.device), index + earlier.total], dim=1),
        torch.cat([earlier.valid.to(index.device), valid], dim=1),
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
