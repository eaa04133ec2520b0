"""`TrimConfig(scope="decode")`: an untouched prefill, then a cache trimmed by the votes of all cross-attention layers."""

from __future__ import annotations

from typing import Any

import torch

from trim_plugin.attention.scoring import visual_token_scores
from trim_plugin.forward.prefill import Prefill, layer_queries, token_bytes
from trim_plugin.rules.selection import select


class UntouchedPrefill(Prefill):
    """Pictures come in: every cross-attention layer reads all of them as stock does, and votes.

    After the last cross-attention layer the heads of all layers are given to the processors side by side, as (batch, layers ·
    heads, visual tokens), and every layer's cache keeps what any of them wants. The prefill, so the first new token, is
    stock's. Memory: while the prompt is read, all layers hold all visual tokens, as in stock; while decoding, as many as were
    kept. Time: one scoring for each cross-attention layer instead of one in all, and no saving in the prefill.

    Arguments as `Prefill`'s.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._scores: list[torch.Tensor] = []

    def after(self, layer: Any, hidden_states: torch.Tensor) -> None:
        """Take the layer's votes; nothing is trimmed yet."""
        cached = self._cache.layers[layer.layer_idx]
        self._token_bytes = token_bytes(cached.keys, cached.values)
        queries = layer_queries(layer, hidden_states.to(cached.keys.device))
        self._scores.append(visual_token_scores(queries, cached.keys, self._visibility, layer.cross_attn.scaling))

    def finish(self) -> None:
        """Trim every layer, and tell the cache."""
        scores = torch.cat([votes.to(self._scores[0].device) for votes in self._scores], dim=1)
        kept = select(scores, self._visibility, self._cache.config.processor_list, self._first_new)
        self._decodable = kept.to(self._valid.device) & self._valid & self._reachable.gather(1, self._index)
        positions = self._positions(self._decodable)
        for index in self._cache.cross_layers:
            if positions is None:
                self._cache.layers[index].settle()
            else:
                self._cache.layers[index].keep(positions)
        super().finish()
