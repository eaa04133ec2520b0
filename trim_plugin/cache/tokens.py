"""The record of which visual tokens a cache holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from trim_plugin.attention.masks import add_log_sizes, open_mask, pack, take_columns


@dataclasses.dataclass(frozen=True)
class Storage:
    """How layers hold visual tokens, the same for all samples and turns.

    Args:
        token_bytes: bytes of a visual token's keys and values in one layer, as stock holds them.
        dtype: the mask's dtype.
        bucket: widths are multiples of this; 1 unless the cache is static.
        shared_heads: whether several query heads share a key-value head.
    """

    token_bytes: int
    dtype: torch.dtype
    bucket: int = 1
    shared_heads: bool = False

    def wants_mask(self, device: torch.device) -> bool:
        """Whether decoding passes a mask even where every cached token is real.

        A static cache does, since its padding comes and goes. And a CPU with shared heads: without a mask transformers' sdpa
        attention leaves sharing to torch (`enable_gqa`), which is slower there. Measured in whole steps at 11B widths (two self-
        and two cross-attention layers, bfloat16, two threads, in turns): with the mask 0.99, 0.97, 0.92, 0.95 of the time without
        for 49, 160, 400, 960 tokens of one sample, and 0.92, 0.98, 0.84, 0.71 for eight samples. Elsewhere no mask is passed.

        Example:
            >>> Storage(8, torch.float32).wants_mask(torch.device("cpu"))
            False
        """
        return self.bucket > 1 or (self.shared_heads and device.type == "cpu")


@dataclasses.dataclass
class CachedTokens:
    """Which visual tokens the cross-attention layers hold. Travels with the batch (beams, repeats, selections).

    Args:
        index: int64 (batch, width): the visual token behind every cached position, ascending; padded to the longest sample.
        valid: bool (batch, width): False for that padding.
        sizes: int64 (batch, width): how many visual tokens each stands for; 1 unless others were merged into it.
        visible: int64 (batch,): tokens visible to at least one voter.
        reachable: bool (batch, total): visible to the last prompt row, kept or not.
        decode_mask: what a decoding step's one row gets as its mask: additive (batch, 1, 1, width), or None where nothing
            is padding, no size is above 1 and `storage` wants none. Decided at prefill, so that decoding neither syncs nor
            branches on data.
        storage: how layers hold them.

    Example:
        >>> chosen = torch.tensor([[True, False, True], [False, True, False]])
        >>> index, sizes = torch.tensor([[4, 5, 6], [4, 5, 6]]), torch.ones(2, 3, dtype=torch.long)
        >>> storage = Storage(8, torch.float32)
        >>> tokens, positions = CachedTokens.choose(index, sizes, chosen, torch.tensor([3, 3]), chosen, storage)
        >>> tokens.index.tolist(), tokens.valid.tolist(), positions.tolist()
        ([[4, 6], [5, 4]], [[True, True], [True, False]], [[0, 2], [1, 0]])
    """

    index: torch.Tensor
    valid: torch.Tensor
    sizes: torch.Tensor
    visible: torch.Tensor
    reachable: torch.Tensor
    decode_mask: torch.Tensor | None
    storage: Storage

    @classmethod
    def choose(
        cls,
        index: torch.Tensor,
        sizes: torch.Tensor,
        chosen: torch.Tensor,
        visible: torch.Tensor,
        reachable: torch.Tensor,
        storage: Storage,
    ) -> tuple[CachedTokens, torch.Tensor]:
        """The record of the chosen columns, bool (batch, columns), and the positions to keep, int64 (batch, width)."""
        positions, valid = pack(chosen, storage.bucket)
        sizes = sizes.gather(1, positions).masked_fill(~valid, 1)
        return cls(
            index=index.gather(1, positions),
            valid=valid,
            sizes=sizes,
            visible=visible,
            reachable=reachable,
            decode_mask=_decode_mask(valid, sizes, storage),
            storage=storage,
        ), positions

    def reading_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """What several rows get: the columns of an additive mask (batch, 1, rows, total) that are held, with log sizes."""
        return add_log_sizes(take_columns(mask, self.index, self.valid), self.sizes)

    def open_reading_mask(self, rows: int) -> torch.Tensor:
        """The same where every row may read everything."""
        return add_log_sizes(open_mask(self.valid, rows, self.storage.dtype), self.sizes)

    @property
    def total(self) -> int:
        """Visual tokens of a sample, kept or not."""
        return self.reachable.shape[1]

    def narrowed_to(self, reachable: torch.Tensor) -> tuple[CachedTokens, torch.Tensor]:
        """What is left when only these tokens, bool (batch, total), are reachable, and the positions to keep."""
        left = self.valid & reachable.to(self.index.device).gather(1, self.index)
        return CachedTokens.choose(self.index, self.sizes, left, self.visible, reachable, self.storage)

    @classmethod
    def joined(cls, parts: Sequence[CachedTokens], bucket: int) -> CachedTokens:
        """The samples of several batches one after the other, padded to the longest and to a multiple of `bucket`."""
        storage = dataclasses.replace(parts[0].storage, bucket=bucket)
        longest = max(part.index.shape[1] for part in parts)
        width = -(-longest // bucket) * bucket

        def padded(name: str, fill: int) -> torch.Tensor:
            tensors = [getattr(part, name) for part in parts]
            return torch.cat([torch.nn.functional.pad(one, (0, width - one.shape[1]), value=fill) for one in tensors])

        valid, sizes = padded("valid", 0), padded("sizes", 1)
        return cls(
            index=padded("index", 0),
            valid=valid,
            sizes=sizes,
            visible=torch.cat([part.visible for part in parts]),
            reachable=torch.cat([part.reachable for part in parts]),
            decode_mask=_decode_mask(valid, sizes, storage),
            storage=storage,
        )

    def of_samples(self, samples: torch.Tensor) -> CachedTokens:
        """The same for the samples with these indices, int64 (new batch,) or bool (batch,)."""

        def pick(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[samples.to(tensor.device)]

        return dataclasses.replace(
            self,
            index=pick(self.index),
            valid=pick(self.valid),
            sizes=pick(self.sizes),
            visible=pick(self.visible),
            reachable=pick(self.reachable),
            decode_mask=None if self.decode_mask is None else pick(self.decode_mask),
        )


def _decode_mask(valid: torch.Tensor, sizes: torch.Tensor, storage: Storage) -> torch.Tensor | None:
    needed, merged = torch.stack([~valid.all(), (sizes > 1).any()]).tolist()  # one sync for both
    if not (needed or merged or storage.wants_mask(valid.device)):
        return None
    mask = open_mask(valid, 1, storage.dtype)
    return add_log_sizes(mask, sizes) if merged else mask
