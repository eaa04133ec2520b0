"""What one forward of several text rows brings, sees and decides.

A `Turn` is made by the model's hook, which sees the masks before transformers expands them. It begins with the first
cross-attention layer, hands every such layer its visual states and mask, and is dropped after the last one. Decoding one
row needs none.

Three kinds: a turn with pictures selects in the first cross-attention layer and goes on with the survivors; in exact mode it only
drops what decoding cannot read; a turn without pictures reads what is held, and may read less of it than the turn before.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask

from trim_plugin.arithmetic import tile_tokens
from trim_plugin.cache.held import HeldCache
from trim_plugin.cache.kept import KeptTokens, Picked, take_tokens
from trim_plugin.cache.layers import CrossAttentionLayer
from trim_plugin.cache.regrouping import padded_columns
from trim_plugin.forward.encoded import EncodedBatch, EncodedSample, tokens_of_tiles
from trim_plugin.forward.finding import attention_of
from trim_plugin.forward.projections import layer_queries
from trim_plugin.selection.rounds import Unread
from trim_plugin.selection.scoring import visual_token_scores
from trim_plugin.selection.select import Columns, KnownGroups, Selection, select
from trim_plugin.selection.visibility import (
    LOST_TOKENS,
    OTHER_TILES,
    Tiles,
    Visibility,
    add_log_sizes,
    check_columns,
    of_additive,
    of_everything,
    of_tiles,
    open_mask,
    padding_of,
    take_columns,
    warn_without_mask,
)


@dataclasses.dataclass
class Turn:
    """One forward.

    Args:
        pictures: encoded pictures that it reads, an entry a sample; None if it has none.
        seen: who may read what, where the model's hook, or `generate`, could tell from the mask of tiles.
        padding: bool (batch, rows), which text rows are padding; None if there is none.
        tile_tokens: visual tokens of a tile, which follow from the mask; 1 for a text model, which is given a mask of tokens.
        past: text tokens before the forward, as `look` found them.
    """

    pictures: list[EncodedSample] | None = None
    seen: Visibility | Any = None
    padding: torch.Tensor | None = None
    tile_tokens: int = 1
    past: int = 0
    #: Of how many text rows `seen` and `padding` are there already for the next forward; 0 if they are not.
    looked: int = 0
    #: What follows from `seen` for every tile, see `note_tiles`.
    tiles: Tiles | None = None
    #: What was read for all micro-batches: `aspect_ratio_mask`; of encoded pictures `tokens_of_tiles`, and the largest `total`.
    real_tiles: torch.Tensor | None = None
    there: torch.Tensor | None = None
    total: int = 0
    #: Where choices leave what the host reads when all micro-batches are read; None: it is read at once.
    unread: Unread | None = None
    #: Which visual tokens encoded pictures hold; None where the tower yields all of them.
    new: EncodedBatch | None = None
    #: Set when the first cross-attention layer is about to run: from then on a failure leaves the cache neither old nor new.
    begun: bool = False
    #: The place in the cache of the layer that runs.
    place: int = -1
    #: What the layer that runs next is handed: visual states (None: it reads what is held), and the mask over the columns.
    states: torch.Tensor | Any = None
    mask: torch.Tensor | None = None
    #: The first cross-attention layer's queries, (batch, heads, rows, head_dim), until they have scored.
    queries: torch.Tensor | None = None
    #: What the first layer attends to, whether a column stands for several tokens, and the mask without log sizes. None in a turn
    #: without pictures.
    columns: Columns | Any = None
    sized: bool = False
    mask_without_sizes: torch.Tensor | Any = None
    #: What is known of the columns without counting them.
    known: KnownGroups | None = None
    #: What the cache holds after the turn, and which of the columns these are; None if that is what it held before.
    kept: KeptTokens | None = None
    picked: list[Picked] = dataclasses.field(default_factory=list)

    def of_samples(self, samples: slice, unread: Unread) -> Turn:
        """What was noted so far, of some samples."""

        def own(of_all: Any) -> Any:
            return None if of_all is None else of_all[samples]

        return dataclasses.replace(
            self,
            pictures=own(self.pictures),
            seen=self.seen and self.seen.of_samples(samples),
            padding=self.padding if self.padding is None or len(self.padding) == 1 else own(self.padding),
            tiles=self.tiles and self.tiles.of_samples(samples),
            real_tiles=own(self.real_tiles),
            there=own(self.there),
            unread=unread,
        )

    def text_mask(
        self, text_model: Any, cache: HeldCache, text: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What an `MllamaTextModel` makes of its attention mask, without waiting for the device: what is padding is known.

        `text` is what it reads, (batch, rows) or (batch, rows, width); `mask` int64 (batch, text tokens so far), None, or made
        already; `cache` as before the forward. Returns None if nothing is padding; bool (batch, 1, rows, text tokens so far) for
        sdpa attention; else the mask as it is.
        """
        if self.seen is None or not isinstance(mask, torch.Tensor) or mask.ndim != 2 or torch.compiler.is_compiling():
            return mask
        padded, attention = bool(self.seen.padding.any()), text_model.config._attn_implementation
        if not padded:
            # A mask of new text alone, behind other text, hides all of it from transformers; and of a static cache's places only
            # these two leave out on their own those that are free.
            all_text = not self.past and mask.shape[1] == text.shape[1]
            return None if all_text and (attention in ("sdpa", "eager") or not cache.config.static) else mask
        if attention != "sdpa" or mask.device != text.device:
            return mask
        like = text.new_empty(*text.shape[:2], 0, dtype=text_model.dtype)
        return create_causal_mask(text_model.config, like, mask, cache, allow_is_causal_skip=False)

    def look(
        self,
        cache: HeldCache,
        rows: int,
        mask: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        vision_config: Any,
    ) -> None:
        """Read what a model is called with: `cross_attention_mask` and `attention_mask` of `rows` text rows."""
        self.looked, self.seen, self.tiles = rows, None, None
        self.past = past = int(cache.get_seq_length())
        self.padding = padding_of(attention_mask, past, rows)
        if mask is not None and mask.ndim == 4:
            self.seen = of_tiles(mask if mask.shape[1] == rows else mask[:, past : past + rows], self.padding)
        else:
            self.tile_tokens = tile_tokens(vision_config)

    def note_tiles(self, cache: HeldCache, device: torch.device) -> Tiles:
        """Every tile's visibility group, and whether decoding can read it after this turn; copied to the device at once, for all
        samples before they are cut into micro-batches, or else by the first cross-attention layer."""
        if self.tiles is None:
            old_tiles = 0 if cache.kept is None else cache.kept.readable_tiles.shape[1]
            readable, groups = self._readable_tiles(cache), self.seen.groups(old_tiles)
            self.tiles = Tiles(groups, readable, torch.stack([groups, readable.long()]).to(device))
        return self.tiles

    # -- before the first cross-attention layer --------------------------------------------------------------------

    @torch.compiler.disable  # choosing waits for the host: where layers are compiled, it happens between their graphs
    def begin(self, cache: HeldCache, layer: Any, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Look at what the first cross-attention layer is called with.

        Raises:
            ValueError: the mask does not cover the visual tokens of this and earlier turns, or lets text read tokens that
                are gone; or there is no picture at all.
        """
        self.begun = True
        states, mask = kwargs["cross_attention_states"], kwargs["cross_attention_mask"]
        batch, rows, _ = hidden_states.shape
        if states is not None:
            self.states = states.reshape(batch, -1, states.shape[-1])
        elif cache.kept is None:
            raise ValueError("No picture was given, and this TrimmedCache holds none.")
        earlier = cache.kept.total if cache.kept is not None else 0
        new = 0 if self.states is None else self.states.shape[1] if self.new is None else self.new.total
        total = earlier + new
        if mask is not None:
            check_columns(mask, total)
        if self.seen is None and mask is not None:
            self.seen = of_additive(mask, kwargs["full_text_row_masked_out_mask"], self.padding)
        elif self.seen is None:
            of_tile = self.tile_tokens if cache.kept is None else cache.kept.tile_tokens
            self.seen = of_everything(batch, rows, total, of_tile, self.padding)
        self.tile_tokens = total // max(1, self.seen.open.shape[2])
        if cache.kept is not None and cache.kept.tile_tokens != self.tile_tokens:
            raise ValueError(OTHER_TILES.format(before=cache.kept.tile_tokens, now=self.tile_tokens))
        if cache.kept is not None and mask is not None:
            gone = ~cache.kept.readable_tiles[list(cache.kept.order)]
            if self.seen.reads_any(gone, cache.config.keeps_reachable):
                raise ValueError(LOST_TOKENS)
        if self.states is None:
            self._read(cache, mask, rows)
        else:
            self._bring(cache, mask, rows)
            if cache.config.needs_scores:
                self.queries = layer_queries(layer, hidden_states)

    def _read(self, cache: HeldCache, mask: torch.Tensor | None, rows: int) -> None:
        """No new pictures: the layers read what is held, and what this turn's last row cannot read any more goes."""
        readable = self._readable_tiles(cache)
        if not torch.equal(readable, cache.kept.readable_tiles[list(cache.kept.order)]):
            cache.unshare()
            columns = padded_columns(cache.kept)
            still = readable.to(columns.index.device).gather(1, columns.index // columns.tile_tokens)
            columns = dataclasses.replace(columns, readable=columns.readable & still)
            left = columns.readable.sum(dim=1).tolist()
            self._leave(cache, columns, left, readable, cache.kept.visible, cache.kept.token_bytes, cache.kept.sized)
        kept = cache.kept
        columns = padded_columns(kept)
        index, valid, sizes = columns.index, columns.valid, columns.sizes
        if kept.shared:
            index, valid, sizes = (
                tensor.index_select(0, kept.sources_on(index.device)) for tensor in (index, valid, sizes)
            )
        self.mask = open_mask(valid, rows, kept.dtype) if mask is None else take_columns(mask, index, valid)
        if kept.sized:
            self.mask = add_log_sizes(self.mask, sizes)

    def _bring(self, cache: HeldCache, mask: torch.Tensor | None, rows: int) -> None:
        """New pictures: the columns are what is held, side by side, and then all of the new visual tokens."""
        if cache.kept is not None:
            cache.unshare()
        held, of_tile, device = cache.kept, self.tile_tokens, self.states.device
        if self.new is not None:
            new, sizes, valid, complete = self.new.index, self.new.sizes, self.new.valid, self.new.complete
        else:
            new = torch.arange(self.states.shape[1], device=device).expand(len(self.states), -1)
            sizes, valid, complete = torch.ones_like(new), torch.ones_like(new, dtype=torch.bool), True
        old_tiles = 0 if held is None else held.readable_tiles.shape[1]
        tiles = self.note_tiles(cache, device)
        group_of_tile, readable = tiles.on_device.to(device)
        index = new + old_tiles * of_tile if old_tiles else new
        tile = index // of_tile
        self.columns = Columns(
            index=index,
            valid=valid,
            sizes=sizes,
            group=group_of_tile.gather(1, tile).masked_fill(~valid, -1),
            readable=(readable.gather(1, tile) != 0) & valid,
            first_new=0,
            tile_tokens=of_tile,
        )
        if held is not None:
            self.columns = padded_columns(held).followed_by(self.columns, readable != 0)
        self.sized = not complete or (held is not None and held.sized)
        new_tiles = tiles.groups.shape[1] - old_tiles
        there = torch.full((len(new), new_tiles), of_tile, device="cpu")
        if not complete:
            there = tokens_of_tiles(self.pictures or [], new_tiles, of_tile) if self.there is None else self.there
        before = (tiles.readable[:, :0], [0] * len(new)) if held is None else (held.readable_tiles, held.counts())
        self.known = KnownGroups.of(tiles, there, *before)
        if mask is None:
            warn_without_mask()
            self.mask_without_sizes = open_mask(self.columns.valid, rows, self.states.dtype)
        elif held is None and complete:
            self.mask_without_sizes = mask
        else:
            self.mask_without_sizes = take_columns(mask, self.columns.index, self.columns.valid)
        self.mask = (
            add_log_sizes(self.mask_without_sizes, self.columns.sizes) if self.sized else self.mask_without_sizes
        )

    def _readable_tiles(self, cache: HeldCache) -> torch.Tensor:
        """bool (batch, tiles) on the CPU: what decoding can read after this turn, kept or not."""
        readable = self.seen.readable_tiles(cache.config.keeps_reachable).clone()
        if cache.kept is not None:
            readable[:, : cache.kept.readable_tiles.shape[1]] &= cache.kept.readable_tiles[list(cache.kept.order)]
        return readable

    # -- after the cross-attention layers --------------------------------------------------------------------------

    @torch.compiler.disable
    def after(self, cache: HeldCache, layer: Any) -> None:
        """Select after the first layer; trim every layer's cache to what decoding can read; the last one ends the turn."""
        held = cache.layers[self.place]
        if self.columns is not None and self.place == cache.cross_layers[0]:
            self._select(cache, layer, held)
        if self.kept is not None:
            held.settle(self.kept, self.picked)
        if self.place == cache.cross_layers[-1]:
            cache.kept = cache.kept if self.kept is None else self.kept
            cache.turn = None

    def _select(self, cache: HeldCache, layer: Any, held: CrossAttentionLayer) -> None:
        """What survives the first layer; later ones get the survivors' states and columns alone."""
        columns, config, keys = self.columns, cache.config, held.keys
        scores = None  # exact
        if not config.keeps_reachable:
            scores = keys.new_zeros(len(keys), 1, keys.shape[2], dtype=torch.float32)
        if self.queries is not None:
            # Sizes of earlier turns' columns, as well where all are 1: some columns may only pad a sample.
            log_sizes = columns.sizes.float().log() if self.sized or columns.first_new else None
            queries, self.queries = self.queries.to(keys.device), None
            scores = visual_token_scores(
                queries, keys, self.seen, columns.tile_of, attention_of(layer).scaling, log_sizes
            )
        tiles, rules, merge = self.note_tiles(cache, keys.device), config.processor_list, config.merge
        groups = int(tiles.groups.max()) + 1
        chosen = select(scores, keys, self.states, columns, groups, rules, merge, self.known, self.unread)
        visible = (columns.sizes * (columns.group >= 0)).sum(dim=1)
        if cache.kept is not None:
            visible = visible + cache.kept.visible
        if chosen.positions is not None:
            self._go_on_with(chosen, held)
        token_bytes = 2 * keys.shape[1] * keys.shape[3] * keys.element_size()
        self._leave(cache, self.columns, chosen.readable_counts, tiles.readable, visible, token_bytes, self.sized)

    def _go_on_with(self, chosen: Selection, held: CrossAttentionLayer) -> None:
        """Narrow states, mask, columns, and what the first layer has cached, to what was chosen."""
        old, before = self.columns.first_new, self.columns
        if chosen.merging is None:
            held.change_new(lambda tensor: take_tokens(tensor, chosen.positions))
            self.states = take_tokens(self.states, chosen.positions)
        else:
            held.change_new(chosen.merging.mean)
            self.states = chosen.merging.mean(self.states)
            self.sized = True
        self.columns = before.narrowed(chosen)
        earlier = torch.arange(old, device=chosen.positions.device).expand(len(chosen.positions), -1)
        places = torch.cat([earlier, chosen.positions + old], dim=1)
        self.mask = take_columns(self.mask_without_sizes, places, self.columns.valid)
        if self.sized:
            self.mask = add_log_sizes(self.mask, self.columns.sizes)

    def _leave(
        self,
        cache: HeldCache,
        columns: Columns,
        left: list[int],
        readable: torch.Tensor,
        visible: torch.Tensor,
        token_bytes: int,
        sized: bool,
    ) -> None:
        """Note what is held from here on: of the columns those that decoding can read, `left` of every sample."""
        self.kept, self.picked = KeptTokens.of(
            columns,
            left,
            visible=visible,
            readable_tiles=readable,
            token_bytes=token_bytes,
            dtype=cache.kept.dtype if self.states is None else self.states.dtype,
            sized=sized,
            bucket=cache.config.bucket,
        )
