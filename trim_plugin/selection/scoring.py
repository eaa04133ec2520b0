"""How much the prompt's text attends to every visual token, computed without ever holding an attention map."""

from __future__ import annotations

import math

import torch

from trim_plugin.selection.visibility import Visibility

#: Bytes that one block of float32 logits may take; twice as much exists at a time where the model's dtype is narrower.
BLOCK_BYTES = 32 * 2**20


def visual_token_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    seen: Visibility,
    tile_of: torch.Tensor,
    scaling: float,
    log_sizes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over the query rows that may read a visual token of softmax(q·k·scaling + log size), per head.

    Works in blocks of samples, heads and text rows, some ten launches each. q·k is computed in the model's dtype as eager
    attention does, the softmax in float32. No tensor of shape (heads, rows, tokens) and no repeated or up-cast copy of all keys
    exists; scratch beyond the result stays under 64 MiB for a device's own cache as for a CPU.

    Cost against an 11B prefill: q·k of one layer is 2·H·T·N·d operations and the sum over rows 2·H·T·N, together
    2·4096·T·N·(1 + 1/128). The prefill's cross-attention alone does q·k and attention·v in 8 layers, 16 times that for an
    exact prefill. With T = 128 rows and N = 6,404 tokens scoring is 6.8 GFLOP; the text model alone is about 2·8.0e9 per
    text row and 2·8·2·4096·1024 per visual token, 2.9 TFLOP, and the vision tower adds about 2·0.85e9 per visual token,
    10.9 TFLOP: together 0.05 %. For T = 4,096 the share is 0.3 %. (Widths: Llama-3.2-11B-Vision's config.)

    Source: Lee et al. 2025, arXiv 2504.00557, section 3; blockwise like FlashAttention, but rows are summed.

    Args:
        queries: (batch, heads, rows, head_dim), normed as the layer does.
        keys: (batch, key-value heads, tokens, head_dim).
        seen: who may read what; its rows are the queries'.
        tile_of: int64 (batch, tokens), the tile of every token; −1 for columns that are no token.
        scaling: factor on q·k, 1/√head_dim in Mllama.
        log_sizes: float32 (batch, tokens), log of how many visual tokens each stands for; None if all are 1.

    Returns:
        float32 (batch, heads, tokens); −inf where no query row may read.

    Example:
        >>> q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 5, 4)
        >>> seen = Visibility(torch.ones(1, 3, 1, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool), 5)
        >>> visual_token_scores(q, k, seen, torch.zeros(1, 5, dtype=torch.long), 0.5)[0, 1]
        tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
    """
    batch, heads, _, _ = queries.shape
    device = keys.device
    scores = torch.zeros(batch, heads, keys.shape[2], dtype=torch.float32, device=device)
    reads = seen.open & seen.query_rows[..., None]
    spans = [_span(own.any(dim=-1)) for own in reads]
    alike = all(bool(own[span].all()) for own, span in zip(reads, spans, strict=True))
    on_device = None if alike else reads.to(device)  # the one copy to the device, and only where some row reads a part
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for sample, rows in enumerate(spans):
            if rows.start == rows.stop:
                scores[sample] = -math.inf
                continue
            own = None if on_device is None else on_device[sample, rows]
            offsets = None if log_sizes is None else log_sizes[sample].to(device)
            _add_attention(
                scores[sample], queries[sample, :, rows], keys[sample], own, tile_of[sample], scaling, offsets
            )
            if own is None:
                scores[sample].div_(rows.stop - rows.start).masked_fill_(tile_of[sample] < 0, -math.inf)
            else:
                readers = own.sum(dim=0).index_select(0, tile_of[sample].clamp(min=0)) * (tile_of[sample] >= 0)
                scores[sample].div_(readers.clamp(min=1)).masked_fill_(readers == 0, -math.inf)
    return scores


def _span(scoring: torch.Tensor) -> slice:
    """From the first to the last of the rows that score, bool (rows,); rows between them that don't are given no weight."""
    rows = scoring.nonzero()[:, 0].tolist()
    return slice(rows[0], rows[-1] + 1) if rows else slice(0, 0)


def _add_attention(
    scores: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    reads: torch.Tensor | None,
    tile_of: torch.Tensor,
    scaling: float,
    offsets: torch.Tensor | None,
) -> None:
    """Add the attention of one sample's rows to `scores` (heads, tokens), block by block; `reads` None: all may read all."""
    kv_heads, tokens, _ = keys.shape
    shared, rows = queries.shape[0] // kv_heads, queries.shape[1]
    row_bytes = shared * tokens * 4
    block_rows = min(rows, max(1, BLOCK_BYTES // row_bytes))
    block_heads = min(kv_heads, max(1, BLOCK_BYTES // (row_bytes * block_rows)))
    scratch = _Scratch(block_heads * shared * block_rows * tokens, keys)
    for start in range(0, rows, block_rows):
        part = slice(start, start + block_rows)
        closed = weights = None
        if reads is not None:
            closed = ~reads[part].index_select(1, tile_of.clamp(min=0)) | (tile_of < 0)
            weights = (~closed).any(dim=1).float()
        elif offsets is not None:  # not simply the tokens of whole pictures: some columns may be padding
            closed = (tile_of < 0)[None]
        for first in range(0, kv_heads, block_heads):
            last = min(first + block_heads, kv_heads)
            own = slice(first * shared, last * shared)
            scores[own] += scratch.summed_attention(
                queries[own, part].to(keys), keys[first:last], closed, weights, scaling, offsets
            )


class _Scratch:
    """The buffers of one sample's blocks, made once: asking the allocator anew for every block makes the heap grow."""

    def __init__(self, elements: int, like: torch.Tensor) -> None:
        self._logits = like.new_empty(elements)
        is_float = like.dtype == torch.float32
        self._weights = self._logits if is_float else like.new_empty(elements, dtype=torch.float32)

    def summed_attention(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        closed: torch.Tensor | None,
        row_weights: torch.Tensor | None,
        scaling: float,
        offsets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Softmax attention of a block of rows, summed over the rows: (heads, tokens) float32.

        Args:
            queries: (heads, rows, head_dim).
            keys: (key-value heads, tokens, head_dim), a view into the layer's keys.
            closed: bool (rows, tokens), True where a row may not read; None if all may.
            row_weights: float32 (rows,), 0 for rows that don't score; None if all do.
            scaling: factor on q·k.
            offsets: float32 (tokens,), added to the logits; None for nothing.
        """
        heads, rows, dim = queries.shape
        kv_heads, tokens, _ = keys.shape
        stacked = queries.reshape(kv_heads, heads // kv_heads * rows, dim)
        size = heads * rows * tokens
        logits = self._logits[:size].view(kv_heads, -1, tokens)
        torch.bmm(stacked, keys.transpose(1, 2), out=logits).mul_(scaling)
        weights = self._weights[:size].view(heads, rows, tokens)
        if self._weights is not self._logits:
            weights.copy_(logits.view_as(weights))
        if offsets is not None:
            weights.add_(offsets)
        if closed is not None:
            # Finite, so that a row that reads nothing yields numbers, which then weigh nothing.
            weights.masked_fill_(closed, torch.finfo(torch.float32).min)
        weights.sub_(weights.amax(dim=-1, keepdim=True)).exp_()
        normalizers = weights.sum(dim=-1).reciprocal_()
        if row_weights is not None:
            normalizers *= row_weights
        return torch.bmm(normalizers.view(heads, 1, rows), weights)[:, 0]
