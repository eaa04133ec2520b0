"""Cross-attention layers whose buffers keep their size, so that one compiled graph decodes many pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from trim_plugin.cache.layers import CrossAttentionLayer, take_tokens
from trim_plugin.cache.quantized import QuantizedCrossAttentionLayer, QuantizedTokens
from trim_plugin.cache.sources import SourceMap


class StaticCrossAttentionLayer(CrossAttentionLayer):
    """Holds the kept tokens in buffers whose width is a multiple of `TrimConfig.static_bucket`; padding is masked.

    Buffers outlive `reset()` and are filled again if the next picture's tokens need the same width.

    Example:
        >>> layer = StaticCrossAttentionLayer()
        >>> layer.expected = True
        >>> _ = layer.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
        >>> layer.keep(torch.tensor([[0, 3, 0, 0]]))
        >>> layer.keys.shape, layer.is_compileable
        (torch.Size([1, 2, 4, 4]), True)
    """

    is_compileable = True
    is_croppable = False

    def __init__(self, sources: SourceMap | None = None) -> None:
        super().__init__(sources)
        self._buffers: list[torch.Tensor] | None = None

    def keep(self, positions: torch.Tensor) -> None:
        """Copy the tokens at `positions`, int64 (batch, width), into the buffers."""
        positions = positions.to(self.keys.device)
        self._fill(take_tokens(self.keys, positions), take_tokens(self.values, positions))

    def join(self, parts: Sequence[CrossAttentionLayer], width: int) -> None:
        """Copy what the parts of a batch hold into the buffers, see the base class."""
        super().join(parts, width)
        self._fill(self._held["keys"], self._held["values"])

    def _fill(self, keys: Any, values: Any) -> None:
        self._buffers = _filled(self._buffers, [keys, values])
        self.keys, self.values = self._buffers

    def held_tensors(self) -> list[torch.Tensor | None]:
        """The buffers, also while they wait to be filled again."""
        return [*super().held_tensors(), *(self._buffers or ())]


class StaticQuantizedCrossAttentionLayer(QuantizedCrossAttentionLayer):
    """A `QuantizedCrossAttentionLayer` whose codes and scales lie in buffers, as `StaticCrossAttentionLayer`'s tensors do.

    A compiled step dequantizes within its graph.

    Example:
        >>> layer = StaticQuantizedCrossAttentionLayer("int8")
        >>> layer.expected = True
        >>> _ = layer.update(torch.ones(1, 2, 5, 32), torch.ones(1, 2, 5, 32))
        >>> layer.keep(torch.tensor([[0, 3, 0, 0]]))
        >>> layer.release()
        >>> layer.keys.shape, layer.is_compileable
        (torch.Size([1, 2, 4, 32]), True)
    """

    is_compileable = True
    is_croppable = False

    def __init__(self, format: str, sources: SourceMap | None = None) -> None:
        super().__init__(format, sources)
        self._buffered: dict[str, QuantizedTokens] | None = None

    def join(self, parts: Sequence[QuantizedCrossAttentionLayer], width: int) -> None:
        """Copy what the parts of a batch hold into the buffers, see the base class."""
        super().join(parts, width)
        self.release()

    def release(self) -> None:
        """Quantize what a prefill has left, into the buffers; drop the full tensors."""
        super().release()
        if self._stored is self._buffered or self._stored is None:
            return
        buffers = None if self._buffered is None else _tensors(self._buffered)
        filled = iter(_filled(buffers, _tensors(self._stored)))
        self._stored = self._buffered = {
            name: dataclasses.replace(tokens, codes=next(filled), scales=next(filled))
            for name, tokens in self._stored.items()
        }

    def held_tensors(self) -> list[torch.Tensor | None]:
        """Codes and scales, also while they wait to be filled again."""
        return [*super().held_tensors(), *(_tensors(self._buffered) if self._buffered is not None else ())]


def _tensors(stored: dict[str, QuantizedTokens]) -> list[torch.Tensor]:
    return [tensor for tokens in stored.values() for tensor in (tokens.codes, tokens.scales)]


def _filled(buffers: list[torch.Tensor] | None, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The buffers, filled; new ones if there are none or they don't fit."""
    if buffers is not None and all(map(_fits, buffers, tensors)):
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)
        return buffers
    # Contiguous copies whose address a CUDA graph may rely on, as transformers' static layers do it.
    made = [tensor.contiguous() for tensor in tensors]
    for buffer in made:
        torch._dynamo.mark_static_address(buffer)
    return made


def _fits(buffer: torch.Tensor, tensor: torch.Tensor) -> bool:
    return buffer.shape == tensor.shape and buffer.dtype == tensor.dtype and buffer.device == tensor.device
