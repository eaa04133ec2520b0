"""How the keys and values of visual tokens are stored.

A store is a few tensors whose first dimension counts samples and whose second last counts visual tokens. So picking samples,
dropping tokens and appending a later picture's are the same operations for all kinds (`blocks` has the quantized ones).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Store(ABC):
    """Keys and values of visual tokens, of samples that hold about as many."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What is held: (samples, ..., tokens, features) each."""

    @abstractmethod
    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Store:
        """A store of this kind that holds these tensors."""

    @abstractmethod
    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, (samples, key-value heads, tokens, head_dim) each."""

    @property
    def shape(self) -> tuple[int, int]:
        """Samples and tokens."""
        first = self.tensors[0]
        return first.shape[0], first.shape[-2]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """A store of this kind with every tensor changed alike."""
        return self.with_tensors([change(tensor) for tensor in self.tensors])

    def take(self, rows: slice | torch.Tensor, positions: torch.Tensor | None) -> Any:
        """A store of these samples, each with its tokens at `positions`, int64 (samples, kept); None for all tokens."""

        def taken(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(rows, slice):
                tensor = tensor.index_select(0, rows.to(tensor.device))
            elif rows != slice(0, len(tensor)):
                # A part that is not picked from below is copied: a view would hold on to all of it.
                tensor = tensor[rows] if positions is not None else tensor[rows].clone()
            return tensor.contiguous() if positions is None else take_tokens(tensor, positions.to(tensor.device))

        return self.map(taken)

    def followed_by(self, later: Store) -> Any:
        """A store of these tokens and, behind them, `later` ones of the same samples."""
        return self.with_tensors([torch.cat(pair, dim=-2) for pair in zip(self.tensors, later.tensors, strict=True)])

    @staticmethod
    def joined(stores: Sequence[Any], width: int) -> Any:
        """A store of the samples of several, one after the other, padded to `width` tokens (which read as zeros) or cut to it."""
        first = stores[0]
        if len(stores) == 1 and first.shape[1] == width:
            return first
        columns = zip(*(store.tensors for store in stores), strict=True)
        return first.with_tensors([padded_join(tensors, width, dim=-2) for tensors in columns])


@dataclasses.dataclass(frozen=True)
class Plain(Store):
    """Keys and values in the model's dtype, (samples, key-value heads, tokens, head_dim) each.

    Example:
        >>> store = Plain(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
        >>> store.take(slice(0, 1), torch.tensor([[0, 3]])).shape
        (1, 2)
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """See the base class."""
        return self.keys, self.values

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Plain:
        """See the base class."""
        return Plain(*tensors)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See the base class."""
        return self.keys, self.values


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


def padded_join(tensors: Sequence[torch.Tensor], width: int, dim: int, fill: int = 0) -> torch.Tensor:
    """Tensors one after the other along the batch, filled up, or cut, to `width` along `dim`.

    Example:
        >>> padded_join([torch.ones(1, 1), torch.ones(1, 2)], 2, dim=1)
        tensor([[1., 0.],
                [1., 1.]])
    """
    first = tensors[0]
    if len(tensors) == 1 and first.shape[dim] == width:
        return first
    shape = list(first.shape)
    shape[0], shape[dim] = sum(tensor.shape[0] for tensor in tensors), width
    whole, start = first.new_full(shape, fill), 0
    for tensor in tensors:
        length = min(width, tensor.shape[dim])
        whole.narrow(0, start, tensor.shape[0]).narrow(dim, 0, length).copy_(tensor.narrow(dim, 0, length))
        start += tensor.shape[0]
    return whole
