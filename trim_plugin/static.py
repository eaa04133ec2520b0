"""Cross-attention layers whose buffers keep their size, so that one compiled graph decodes many pictures."""

from __future__ import annotations

from typing import Any

import torch

from trim_plugin.cache import CrossAttentionLayer, take_tokens


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

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def keep(self, positions: torch.Tensor) -> None:
        """Copy the tokens at `positions`, int64 (batch, width), into the buffers."""
        positions = positions.to(self.keys.device)
        kept = take_tokens(self.keys, positions), take_tokens(self.values, positions)
        if self._buffers is None or not all(map(_fits, self._buffers, kept)):
            # Contiguous copies whose address a CUDA graph may rely on, as transformers' static layers do it.
            self._buffers = kept[0].contiguous(), kept[1].contiguous()
            for buffer in self._buffers:
                torch._dynamo.mark_static_address(buffer)
        else:
            for buffer, tensor in zip(self._buffers, kept, strict=True):
                buffer.copy_(tensor)
        self.keys, self.values = self._buffers

    def held_tensors(self) -> list[torch.Tensor | None]:
        """The buffers, also while they wait to be filled again."""
        return [self.keys, self.values, *(self._buffers or ())]


def _fits(buffer: torch.Tensor, tensor: torch.Tensor) -> bool:
    return buffer.shape == tensor.shape and buffer.dtype == tensor.dtype and buffer.device == tensor.device
