"""Cross-attention layers of a cache: keys and values of visual tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from trim_plugin.cache.sources import SourceMap


class CrossAttentionLayer(DynamicLayer):
    """Keys and values of visual tokens. They come with a picture, are trimmed once, and never grow with the text.

    Holds an entry for every source sample; `keys` and `values` are read with an entry for every sample of the batch.

    Args:
        sources: which entry each sample reads; shared with the other layers of the cache.

    Example:
        >>> layer = CrossAttentionLayer()
        >>> layer.expected = True
        >>> keys, values = layer.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
        >>> layer.keep(torch.tensor([[0, 3]]))
        >>> layer.crop(-1)  # the text is cropped, not the picture
        >>> layer.keys.shape
        torch.Size([1, 2, 2, 4])
    """

    #: Set by the hook that precedes an update. Without hooks nothing would be trimmed, silently.
    expected = False

    def __init__(self, sources: SourceMap | None = None) -> None:
        self.sources = sources or SourceMap()
        self._held: dict[str, torch.Tensor | None] = {"keys": None, "values": None}
        super().__init__()

    @property
    def keys(self) -> Any:
        """(batch, key-value heads, visual tokens, head_dim); None before the first picture."""
        return self._read("keys")

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._held["keys"] = states

    @property
    def values(self) -> Any:
        """Like `keys`."""
        return self._read("values")

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._held["values"] = states

    def _read(self, name: str) -> torch.Tensor | None:
        held = self._held[name]
        return None if held is None else self.sources.spread(held)

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

    def get_seq_length(self) -> int:
        """Visual tokens held (a batch's longest sample)."""
        held = self._held["keys"]
        return 0 if held is None or held.numel() == 0 else held.shape[-2]

    def take_entries(self, entries: torch.Tensor) -> None:
        """Hold these entries only, int64 (new entries,), which may name one several times."""
        for name, held in self._held.items():
            if held is not None:
                self._held[name] = held.index_select(0, entries.to(held.device))

    def part(self, samples: slice, sources: SourceMap) -> Any:
        """A layer that holds the entries of these samples alone; here every sample has its own (`HeldCache.unshare`)."""
        part = copy.copy(self)
        part.sources = sources
        part._held = {name: None if held is None else held[samples] for name, held in self._held.items()}
        return part

    def join(self, parts: Sequence[Any], width: int) -> None:
        """Hold what the parts of a batch hold, one after the other, padded to `width` tokens.

        Args:
            parts: layers of this kind (not static) that have been filled.
            width: visual tokens, at least as many as the longest part holds.
        """
        for name in self._held:
            self._held[name] = joined([part._held[name] for part in parts], width, dim=2)
        self.is_initialized = True

    def settle(self) -> None:
        """Lay keys and values out head by head, as decoding reads them; a projection returns them token by token.

        Measured: decoding from the projection's layout took up to 1.4 times as long (small model, CPU, 8 samples of 8 pictures).
        """
        self.keys, self.values = self.keys.contiguous(), self.values.contiguous()

    def reset(self) -> None:
        """Forget everything."""
        # Not the base class's: in transformers 5.17 it zeroes what is held, which may be one entry read by many samples.
        self._held = {"keys": None, "values": None}
        self.is_initialized = False

    def release(self) -> None:
        """Called when a forward is done with the layer: drop what exists only to be read. Nothing here."""

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing: taking back text tokens (assisted decoding) leaves the picture in place."""

    def held_tensors(self) -> list[torch.Tensor | None]:
        """The tensors whose bytes this layer holds."""
        return list(self._held.values())


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


def joined(tensors: Sequence[torch.Tensor], width: int, dim: int) -> torch.Tensor:
    """Tensors one after the other along the batch, with zeros up to `width` along `dim`.

    A single tensor of that width is returned as it is.

    Example:
        >>> joined([torch.ones(1, 1), torch.ones(1, 2)], 2, dim=1)
        tensor([[1., 0.],
                [1., 1.]])
    """
    first = tensors[0]
    if len(tensors) == 1 and first.shape[dim] == width:
        return first
    shape = list(first.shape)
    shape[0], shape[dim] = sum(tensor.shape[0] for tensor in tensors), width
    whole, start = first.new_zeros(shape), 0
    for tensor in tensors:
        whole.narrow(0, start, tensor.shape[0]).narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        start += tensor.shape[0]
    return whole
