"""Cross-attention layers of a cache: keys and values of visual tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


class CrossAttentionLayer(DynamicLayer):
    """Keys and values of visual tokens. They come with a picture, are trimmed once, and never grow with the text.

    Example:
        >>> layer = CrossAttentionLayer()
        >>> layer.expected = True
        >>> keys, values = layer.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
        >>> layer.keep(torch.tensor([[0, 3]]))
        >>> layer.crop(-1)  # the text is cropped, not the picture
        >>> layer.keys.shape
        torch.Size([1, 2, 2, 4])
    """

    keys: Any
    values: Any

    #: Set by the hook that precedes an update. Without hooks nothing would be trimmed, silently.
    expected = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a picture's keys and values, (batch, key-value heads, visual tokens, head_dim), and return all.

        Raises:
            RuntimeError: the model carries no hooks of trim_plugin.
        """
        if not self.expected:
            raise RuntimeError(
                "A TrimmedCache reached a model that has no trim_plugin hooks: it was made for another model, or "
                "trim_plugin.detach(model) was called since. Make a new one: TrimmedCache(model, ...)."
            )
        self.expected = False
        if self.get_seq_length() > 0:
            return super().update(key_states, value_states, *args, **kwargs)
        # The first picture's tensors are taken as they are; concatenating with nothing would copy them.
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return self.keys, self.values

    def keep(self, positions: torch.Tensor) -> None:
        """Hold only the tokens at `positions`, int64 (batch, kept)."""
        positions = positions.to(self.keys.device)
        self.keys = take_tokens(self.keys, positions)
        self.values = take_tokens(self.values, positions)

    def replace(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold these instead of the tokens from position `first` on, (batch, key-value heads, tokens, head_dim) each.

        For the picture that the forward at hand has brought: what was cached before it lies before `first`.
        """
        if first:
            keys = torch.cat([self.keys[:, :, :first], keys], dim=2)
            values = torch.cat([self.values[:, :, :first], values], dim=2)
        self.keys, self.values = keys, values

    def settle(self) -> None:
        """Lay keys and values out head by head, as decoding reads them; a projection returns them token by token.

        Measured: decoding from the projection's layout took up to 1.4 times as long (small model, CPU, 8 samples of 8 pictures).
        """
        self.keys, self.values = self.keys.contiguous(), self.values.contiguous()

    def release(self) -> None:
        """Called when a forward is done with the layer: drop what exists only to be read. Nothing here."""

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing: taking back text tokens (assisted decoding) leaves the picture in place."""

    def held_tensors(self) -> list[torch.Tensor | None]:
        """The tensors whose bytes this layer holds."""
        return [self.keys, self.values]


def take_tokens(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Pick tokens per sample along the second last dimension.

    Args:
        tensor: (batch, ..., tokens, features).
        positions: int64 (batch, kept).

    Returns:
        (batch, ..., kept, features), a copy.

    Example:
        >>> take_tokens(torch.arange(6).view(2, 3, 1), torch.tensor([[0, 2], [1, 1]]))[..., 0]
        tensor([[0, 2],
                [4, 4]])
    """
    if tensor.shape[0] == 1:
        return tensor.index_select(-2, positions[0])
    spread = positions.view(positions.shape[0], *[1] * (tensor.ndim - 3), positions.shape[1], 1)
    return tensor.gather(-2, spread.expand(*tensor.shape[:-2], -1, tensor.shape[-1]))
