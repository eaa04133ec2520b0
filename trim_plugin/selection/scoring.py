"""How much the prompt's text attends to every visual token, computed without ever holding an attention map."""

from __future__ import annotations

import dataclasses
import math

import torch

from trim_plugin.selection.precision import full_float32
from trim_plugin.selection.visibility import Visibility

#: Bytes that one block of float32 logits may take; twice as much exists at a time.
BLOCK_BYTES = 28 * 2**20


def visual_token_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    seen: Visibility,
    tile_of: torch.Tensor,
    scaling: float,
    log_sizes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over the query rows that may read a visual token of softmax(q·k·scaling + log size), per head.

    Works in blocks of samples, heads and text rows, four or five launches each: 16 for a page and 128 rows of the 11B model. q·k
    is computed in the model's dtype as eager attention does, the softmax in float32. No tensor of shape (heads, rows, tokens) and
    no repeated or up-cast copy of all keys exist; scratch beyond the result stays under 64 MiB for a device's own cache as for a
    CPU.

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
        log_sizes: float32 (batch, tokens), log of how many visual tokens each stands for; None if all are 1 and
            every column is a token.

    Returns:
        float32 (batch, heads, tokens); −inf where no query row may read.

    Example:
        >>> q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 5, 4)
        >>> seen = Visibility(torch.ones(1, 3, 1, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool), 5)
        >>> visual_token_scores(q, k, seen, torch.zeros(1, 5, dtype=torch.long), 0.5)[0, 1]
        tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
    """
    batch, heads, kv_heads, tokens, device = *queries.shape[:2], *keys.shape[1:3], keys.device
    reads = seen.open & seen.query_rows[..., None]
    scoring = reads.any(dim=-1)  # bool (batch, rows), on the CPU as all that decides shapes
    scores = torch.empty(batch, heads, tokens, dtype=torch.float32, device=device)
    row, rows = heads // kv_heads * tokens, _span(scoring.any(dim=0))  # values of a key-value head's row of text
    each = kv_heads * row * (rows.stop - rows.start)
    # Keys of several samples are laid out one after the other, which takes room as well.
    together = min(batch, max(1, 2 * BLOCK_BYTES // max(1, 8 * each + keys[0].nbytes)))
    blocks = [slice(first, first + together) for first in range(0, batch, together)]
    spans = [_span(scoring[some].any(dim=0)) for some in blocks]
    alike = all(bool(reads[some, rows].all()) for some, rows in zip(blocks, spans, strict=True))
    on_device = (
        None if alike else seen.reads_on(device)
    )  # the one copy to the device, and only where some row reads a part
    scratch = _Scratch(max(row, min(BLOCK_BYTES // 4, together * each)), keys)
    with full_float32(device):
        for some, rows in zip(blocks, spans, strict=True):
            if rows.start == rows.stop:
                scores[some] = -math.inf
                continue
            own = None if on_device is None else on_device[some, rows]
            readers = _Readers(own, tile_of[some], log_sizes is not None, rows.stop - rows.start)
            offsets = None if log_sizes is None else log_sizes[some].to(device)
            scratch.add_attention(scores[some], queries[some, :, rows], keys[some], readers, scaling, offsets)
            readers.average(scores[some])
    return scores


def _span(scoring: torch.Tensor) -> slice:
    """From the first to the last of the rows that score, bool (rows,); rows between them that don't are given no weight."""
    rows = scoring.nonzero()[:, 0].tolist()
    return slice(rows[0], rows[-1] + 1) if rows else slice(0, 0)


@dataclasses.dataclass(frozen=True)
class _Readers:
    """Which of some samples' rows read what.

    Args:
        reads: bool (samples, rows, tiles), on the device; None if every row reads every tile.
        tile_of: int64 (samples, tokens).
        padded: whether some columns may be no token.
        rows: how many there are.
    """

    reads: torch.Tensor | None
    tile_of: torch.Tensor
    padded: bool
    rows: int

    def closed(self, rows: slice) -> torch.Tensor | None:
        """bool (samples, rows or 1, tokens), True where a row may not read; None if all may."""
        if self.reads is None:
            return (self.tile_of < 0)[:, None] if self.padded else None
        return ~self._by_token(self.reads[:, rows]) | (self.tile_of < 0)[:, None]

    def _by_token(self, by_tile: torch.Tensor) -> torch.Tensor:
        """(samples, rows, tokens) of (samples, rows, tiles)."""
        return by_tile.gather(2, self.tile_of.clamp(min=0)[:, None].expand(-1, by_tile.shape[1], -1))

    def average(self, sums: torch.Tensor) -> None:
        """Divide (samples, heads, tokens) by the number of rows that read a token; −inf where there is none."""
        if self.reads is None:
            sums.div_(self.rows)
            if self.padded:
                sums.masked_fill_((self.tile_of < 0)[:, None], -math.inf)
            return
        readers = self._by_token(self.reads.sum(dim=1, keepdim=True)) * (self.tile_of >= 0)[:, None]
        sums.div_(readers.clamp(min=1)).masked_fill_(readers == 0, -math.inf)


class _Scratch:
    """Two buffers for all blocks, made once: asking the allocator anew for every block makes the heap grow.

    Args:
        elements: float32 values of one.
        like: keys; logits are computed in their dtype.
    """

    def __init__(self, elements: int, like: torch.Tensor) -> None:
        self._elements = elements
        self._logits = like.new_empty(elements, dtype=torch.float32)
        self._weights = torch.empty_like(self._logits)
        # Logits of a narrower dtype lie where the attention will: it is written when they have been copied.
        if like.dtype == torch.float32:
            self._products = self._logits
        else:
            self._products = self._weights.view(like.dtype) if like.itemsize < 4 else like.new_empty(elements)

    def add_attention(
        self,
        scores: torch.Tensor,
        queries: torch.Tensor,
        keys: torch.Tensor,
        readers: _Readers,
        scaling: float,
        offsets: torch.Tensor | None,
    ) -> None:
        """Softmax attention summed over rows, (samples, heads, tokens), block by block: a few key-value heads at a time if all
        rows fit, else a few rows of one."""
        samples, kv_heads, tokens, _ = keys.shape
        queries = queries.to(keys).unflatten(1, (kv_heads, -1))  # samples, key-value heads, shared, rows, head_dim
        sums = scores.unflatten(1, (kv_heads, -1))
        shared, rows = queries.shape[2:4]
        block_rows = min(rows, max(1, self._elements // (samples * shared * tokens)))
        block_heads = min(kv_heads, max(1, self._elements // (samples * shared * tokens * block_rows)))
        for start in range(0, rows, block_rows):
            part = slice(start, start + block_rows)
            closed = readers.closed(part)
            # What a row reads of may have gone since: it is given no weight then.
            weights = None if readers.reads is None or closed is None else (~closed).any(dim=-1).float()
            for first in range(0, kv_heads, block_heads):
                own = slice(first, first + block_heads)
                attention = self._attention(queries[:, own, :, part], keys[:, own], closed, scaling, offsets)
                if weights is not None:
                    attention.mul_(weights[:, None, None, :, None])
                if start == 0:
                    torch.sum(attention, dim=3, out=sums[:, own])
                else:
                    sums[:, own] += attention.sum(dim=3)

    def _attention(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        closed: torch.Tensor | None,
        scaling: float,
        offsets: torch.Tensor | None,
    ) -> torch.Tensor:
        """float32 (samples, key-value heads, shared, rows, tokens), in the second buffer; the logits lie in the first."""
        samples, kv_heads, shared, rows, dim = queries.shape
        tokens, shape = keys.shape[2], (samples, kv_heads, shared, rows, keys.shape[2])
        size = samples * kv_heads * shared * rows * tokens
        attention, logits = (buffer[:size].view(shape) for buffer in (self._weights, self._logits))
        first = self._products[:size].view(samples * kv_heads, shared * rows, tokens)
        stacked = queries.reshape(samples * kv_heads, shared * rows, dim)
        torch.baddbmm(first, stacked, keys.flatten(0, 1).transpose(1, 2), beta=0, alpha=scaling, out=first)
        if self._products is not self._logits:
            logits.copy_(first.view(shape))
        if offsets is not None:
            logits += offsets[:, None, None, None]
        if closed is not None:
            # Finite, so that a row that reads nothing yields numbers, which then weigh nothing.
            logits.masked_fill_(closed[:, None, None], torch.finfo(torch.float32).min)
        return torch.softmax(logits, dim=-1, out=attention)
