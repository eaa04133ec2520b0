"""Keys and values of visual tokens in 8 or 4 bits, with bitsandbytes' blockwise functions.

A picture's keys and values are written once and read at every decoding step: they are quantized once, after the prefill has
trimmed them, and dequantized while they are read. A block of 64 values with one scale never crosses a visual token, so that
moving tokens and samples moves codes and scales, and nothing is ever quantized twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from trim_plugin.cache.layers import Store
from trim_plugin.kv_formats import BLOCK, KV_FORMATS, Quantized


@dataclasses.dataclass(frozen=True)
class Blocks(Store):
    """Keys and values as codes and scales.

    Args:
        codes, scales: of the keys and of the values: uint8 (samples, tokens, bytes a token), and float32 (samples, tokens,
            blocks a token), the largest absolute value of every block.
        heads: key-value heads.
        head_dim: values a head.
        dtype: what it is dequantized to.
        format: a name of `KV_FORMATS`.
        levels: what the codes stand for, see `kv_formats.Quantized`.
    """

    codes: tuple[torch.Tensor, torch.Tensor]
    scales: tuple[torch.Tensor, torch.Tensor]
    heads: int
    head_dim: int
    dtype: torch.dtype
    format: str
    levels: torch.Tensor | None = None

    @classmethod
    def of(cls, store: Store, format: str) -> Blocks:
        """Quantize what a store holds.

        Example:
            >>> from trim_plugin.cache.layers import Plain
            >>> states = torch.randn(1, 2, 5, 64)
            >>> stored = Blocks.of(Plain(states, states), "int8")
            >>> [tuple(tensor.shape) for tensor in stored.tensors[:2]]
            [(1, 5, 128), (1, 5, 2)]
            >>> bool((stored.read()[0] - states).norm() < 0.02 * states.norm())
            True
        """
        keys, values = store.read()
        _, heads, _, head_dim = keys.shape
        made = [KV_FORMATS[format].quantize(_rows_of_blocks(states)) for states in (keys, values)]
        codes, scales = (made[0].codes, made[1].codes), (made[0].scales, made[1].scales)
        return cls(codes, scales, heads, head_dim, keys.dtype, format, made[0].levels)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """See the base class."""
        return self.codes[0], self.scales[0], self.codes[1], self.scales[1]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Blocks:
        """See the base class."""
        return dataclasses.replace(self, codes=(tensors[0], tensors[2]), scales=(tensors[1], tensors[3]))

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See the base class."""
        return self._dequantized(0), self._dequantized(1)

    def _dequantized(self, which: int) -> torch.Tensor:
        stored = Quantized(self.codes[which], self.scales[which], self.levels)
        rows = KV_FORMATS[self.format].dequantize(stored, self.dtype)[..., : self.heads * self.head_dim]
        return rows.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


def _rows_of_blocks(states: torch.Tensor) -> torch.Tensor:
    """(batch, heads, tokens, head_dim) as rows (batch, tokens, values), padded with zeros to whole blocks."""
    rows = states.transpose(1, 2).flatten(2)
    return torch.nn.functional.pad(rows, (0, -rows.shape[-1] % BLOCK)).contiguous()
