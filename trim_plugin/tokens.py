"""The record of which visual tokens a cache holds."""

from __future__ import annotations

import dataclasses

import torch

from trim_plugin.masks import open_mask, pack

#: From this many cached tokens on, decoding on a CPU gets an open mask instead of none: transformers' sdpa attention takes
#: another way without a mask (`enable_gqa`), which is slower there. Measured in whole steps at 11B widths (two self- and two
#: cross-attention layers, bfloat16, two threads): with 6,404 tokens 1.39 times stock without a mask and 1.00 with one; with 1,601
#: tokens 1.06 and 0.95. Medians of 11 steps in turns, on a machine that ran other work. The limit between was not measured, nor
#: was a GPU; there no mask is passed.
CPU_MASK_FROM = 1024


@dataclasses.dataclass
class CachedTokens:
    """Which visual tokens the cross-attention layers hold. Travels with the batch (beams, repeats, selections).

    Args:
        index: int64 (batch, width): the visual token behind every cached position, ascending; padded to the longest sample.
        valid: bool (batch, width): False for that padding.
        visible: int64 (batch,): tokens visible to at least one voter.
        reachable: bool (batch, total): visible to the last prompt row, kept or not.
        token_bytes: bytes of a visual token's keys and values in one layer, as stock holds them.
        decode_mask: what a decoding step's one row gets as its mask: additive (batch, 1, 1, width), or None where nothing
            is padding and fixed shapes don't matter. Decided at prefill, so that decoding neither syncs nor branches on data.
        dtype: the mask's dtype.
        bucket: widths are multiples of this; 1 unless the cache is static.

    Example:
        >>> chosen = torch.tensor([[True, False, True], [False, True, False]])
        >>> tokens, positions = CachedTokens.choose(
        ...     torch.tensor([[4, 5, 6], [4, 5, 6]]), chosen, torch.tensor([3, 3]), chosen, 8, torch.float32
        ... )
        >>> tokens.index.tolist(), tokens.valid.tolist(), positions.tolist()
        ([[4, 6], [5, 4]], [[True, True], [True, False]], [[0, 2], [1, 0]])
    """

    index: torch.Tensor
    valid: torch.Tensor
    visible: torch.Tensor
    reachable: torch.Tensor
    token_bytes: int
    decode_mask: torch.Tensor | None
    dtype: torch.dtype
    bucket: int = 1

    @classmethod
    def choose(
        cls,
        index: torch.Tensor,
        chosen: torch.Tensor,
        visible: torch.Tensor,
        reachable: torch.Tensor,
        token_bytes: int,
        dtype: torch.dtype,
        bucket: int = 1,
    ) -> tuple[CachedTokens, torch.Tensor]:
        """The record of the chosen columns, bool (batch, columns), and the positions to keep, int64 (batch, width)."""
        positions, valid = pack(chosen, bucket)
        many_on_cpu = index.device.type == "cpu" and positions.shape[1] >= CPU_MASK_FROM
        needless = bucket == 1 and not many_on_cpu and bool(valid.all())
        decode_mask = None if needless else open_mask(valid, 1, dtype)
        tokens = cls(index.gather(1, positions), valid, visible, reachable, token_bytes, decode_mask, dtype, bucket)
        return tokens, positions

    @property
    def total(self) -> int:
        """Visual tokens of a sample, kept or not."""
        return self.reachable.shape[1]

    def narrowed_to(self, reachable: torch.Tensor) -> tuple[CachedTokens, torch.Tensor]:
        """What is left when only these tokens, bool (batch, total), are reachable, and the positions to keep."""
        left = self.valid & reachable.to(self.index.device).gather(1, self.index)
        return CachedTokens.choose(self.index, left, self.visible, reachable, self.token_bytes, self.dtype, self.bucket)

    def of_samples(self, samples: torch.Tensor) -> CachedTokens:
        """The same for the samples with these indices, int64 (new batch,) or bool (batch,)."""

        def pick(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[samples.to(tensor.device)]

        return dataclasses.replace(
            self,
            index=pick(self.index),
            valid=pick(self.valid),
            visible=pick(self.visible),
            reachable=pick(self.reachable),
            decode_mask=None if self.decode_mask is None else pick(self.decode_mask),
        )
