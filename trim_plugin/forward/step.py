"""What happens to the cross-attention layers in one forward of several text rows.

A `Step` is made before the first cross-attention layer runs, hands every layer its visual states and mask, and is dropped
after the last one. A `Prefill` brings pictures, selects, and trims the layers; a `Reading` brings text only. Decoding one row
needs no step: its mask is `CachedTokens.decode_mask`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from trim_plugin.attention.masks import LOST_TOKENS, check_columns, last_row_reads, reads_any
from trim_plugin.cache.held import HeldCache
from trim_plugin.cache.tokens import CachedTokens


class Step(ABC):
    """One forward through the cross-attention layers."""

    @abstractmethod
    def before(self, first: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Visual states and additive mask for the layer that runs next; `first` for the first cross-attention layer."""

    @abstractmethod
    def after(self, layer: Any, hidden_states: torch.Tensor) -> None:
        """Trim what the layer has cached. `hidden_states` is what the decoder layer was given."""

    @abstractmethod
    def finish(self) -> None:
        """Tell the cache what its layers hold now. Called after the last cross-attention layer."""


def counted_padding(cache: HeldCache, padding: torch.Tensor | None) -> torch.Tensor | None:
    """What does not count when it is asked what decoding can read, and whether a row reads tokens that are gone.

    Padding does not. In exact mode the last row always does: `generate` goes on from it, and lets new text read what it reads.

    Args:
        cache: the cache, whose settings say which mode it is.
        padding: bool (batch or 1, rows), True for rows that are no text; None if there are none.
    """
    if padding is None or not cache.config.keeps_reachable:
        return padding
    return torch.cat([padding[:, :-1], torch.zeros_like(padding[:, -1:])], dim=1)


class Reading(Step):
    """Several text rows that read what is cached: candidates to be verified, or a text-only turn.

    Args:
        cache: the cache, with its tokens.
        mask: additive (batch, 1, rows, all visual tokens so far), or None: every row may read everything.
        open_rows: 0 for blind rows, see `masks`; or None.
        padding: bool (batch or 1, rows), True for rows that are no text; None if there are none.
        hidden_states: (batch, rows, width), what the decoder layer is given.

    Raises:
        ValueError: the mask does not fit the cache, or lets a row read visual tokens that were unreachable before and are gone.
    """

    def __init__(
        self,
        cache: HeldCache,
        tokens: CachedTokens,
        mask: torch.Tensor | None,
        open_rows: torch.Tensor | None,
        padding: torch.Tensor | None,
        hidden_states: torch.Tensor,
    ) -> None:
        self._cache, self._tokens = cache, tokens
        self._narrowed: CachedTokens | None = None
        if mask is None:
            self._mask = tokens.open_reading_mask(hidden_states.shape[1])
        else:
            self._mask = self._read_mask(mask, open_rows, counted_padding(cache, padding))

    def _read_mask(
        self, mask: torch.Tensor, open_rows: torch.Tensor | None, padding: torch.Tensor | None
    ) -> torch.Tensor:
        tokens = self._tokens
        check_columns(mask, tokens.total)
        still = last_row_reads(mask, padding).to(tokens.reachable.device) & tokens.reachable
        lost = reads_any(mask, open_rows, ~tokens.reachable, padding).to(still.device)
        lost_any, narrows = torch.stack([lost, (still != tokens.reachable).any()]).tolist()  # one sync for both
        if lost_any:
            raise ValueError(LOST_TOKENS)
        if narrows:
            self._cache.unshare()
            self._narrowed, self._positions = tokens.narrowed_to(still)
        return tokens.reading_mask(mask)

    def before(self, first: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """No states: the layers read their cache."""
        return None, self._mask

    def after(self, layer: Any, hidden_states: torch.Tensor) -> None:
        """Drop what this turn's last row cannot read any more."""
        if self._narrowed is not None:
            self._cache.layers[layer.layer_idx].keep(self._positions)

    def finish(self) -> None:
        """Note what is left, if the turn could read less than the one before."""
        if self._narrowed is not None:
            self._cache.tokens = self._narrowed
