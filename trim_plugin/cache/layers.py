"""A cross-attention layer of a cache: keys and values of visual tokens, a store for every width class.

A store is a few tensors whose first dimension counts samples and whose second last counts visual tokens. So picking samples,
dropping tokens and appending a later picture's are the same operations for all kinds (`blocks` has the quantized ones).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from trim_plugin.cache.kept import KeptTokens, Picked, take_tokens
from trim_plugin.cache.reading import Lent, in_this_thread
from trim_plugin.cache.regrouping import ClassParts, padded_join, side_by_side


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


class CrossAttentionLayer(DynamicLayer):
    """Keys and values of visual tokens. They come with a picture, are trimmed once, and never grow with the text.

    Two choices make a layer: what tokens are stored as, and whether the tensors are buffers that keep their address, so that
    one compiled graph decodes many pictures. Buffers outlive `reset()` and are filled again if the next picture's tokens need
    the same width.

    Args:
        encode: makes the store that is held out of what the model computed, every token by itself; None holds it as it is.
            Copied and pickled with the layer.
        static: whether to store in buffers.

    Example:
        >>> layer = CrossAttentionLayer()
        >>> keys, values = layer.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
        >>> keys.shape, layer.get_seq_length()
        (torch.Size([1, 2, 5, 4]), 5)
    """

    def __init__(self, encode: Callable[[Plain], Store] | None = None, static: bool = False) -> None:
        self.encode, self.static = encode, static
        self.is_compileable, self.is_croppable = static, not static
        #: One for each of `kept.classes`.
        self.stores: list[Store] = []
        self.kept: KeptTokens | Any = None
        #: How many visual tokens are held, padding included.
        self.places = 0
        #: Each class's decoding mask, where this layer's keys are.
        self.masks: list[torch.Tensor | None] = []
        #: Whether it will be decoded from; a micro-batch's is joined with others first.
        self.decodes = True
        #: Where in the batch the classes' samples are, and the way back; None if they follow each other.
        self.gather: tuple[torch.Tensor, torch.Tensor] | None = None
        #: What the turn in progress has brought: the new pictures' tokens, which stand behind what is held.
        self._new: Plain | Any = None
        #: All that the turn in progress attends to, put together once.
        self._whole: Plain | None = None
        self._buffers: Store | None = None
        super().__init__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be read from a file, which `torch.load(map_location=...)` may have put on another device."""
        self.__dict__.update(state)
        held = self.held_tensors()
        if held:
            self.device = held[0].device
        for buffer in () if self._buffers is None else self._buffers.tensors:
            torch._dynamo.mark_static_address(buffer)

    # -- what transformers reads -----------------------------------------------------------------------------------

    @property
    def keys(self) -> Any:
        """(batch, key-value heads, visual tokens of the fullest sample, head_dim); None before the first picture.

        While a model reads them, see `Lent`.
        """
        return self._lent("keys")

    @keys.setter
    def keys(self, states: None) -> None:
        """Transformers' base class sets None at first; what is held comes by `update`."""

    @property
    def values(self) -> Any:
        """Like `keys`."""
        return self._lent("values")

    @values.setter
    def values(self, states: None) -> None:
        """See `keys`."""

    def _lent(self, name: str) -> Any:
        if self._new is not None:
            return getattr(self._attended(), name)
        if not self.stores:
            return None
        lent = Lent(self, name)
        return lent if torch.compiler.is_compiling() or in_this_thread.lending else lent.tensor()

    def get_seq_length(self) -> int:
        """Visual tokens held, of the sample that has most."""
        held = max((store.shape[1] for store in self.stores), default=0)
        return held if self._new is None else held + self._new.shape[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing: taking back text tokens (assisted decoding) leaves the picture in place."""

    # -- a turn with pictures --------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new pictures' keys and values, (batch, key-value heads, tokens, head_dim); return them behind what was there."""
        self._new, self._whole = Plain(key_states, value_states), None
        self.device, self.is_initialized = key_states.device, True
        return self._attended().read()

    def _attended(self) -> Plain:
        """What the turn in progress attends to: what is held, side by side, and then what is new."""
        if self._whole is None:
            self._whole = Plain(*self.side_by_side().read()).followed_by(self._new) if self.stores else self._new
        return self._whole

    def change_new(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Let the new pictures' keys and values, (batch, key-value heads, tokens, head_dim), be what `change` makes of them."""
        self._new, self._whole = Plain(change(self._new.keys), change(self._new.values)), None

    def settle(self, kept: KeptTokens, picked: Sequence[Picked]) -> None:
        """Hold what a turn leaves: of the columns that it attended to, those that are picked for each class of `kept`.

        Laid out head by head, as decoding reads them; a projection returns them token by token. (Measured: decoding from that
        layout took up to 1.4 times as long; small model, CPU, 8 samples of 8 pictures.)
        """
        columns: Store
        if self._new is None:
            columns = self.side_by_side()
        elif self.stores and self.encode is not None:  # what is held is moved, nothing is encoded twice
            columns = self.side_by_side().followed_by(self._encoded(self._new))
        else:
            columns = self._attended()
        self._new = self._whole = None
        stores = [columns.take(own.rows, own.positions) for own in picked]
        self._hold(kept, [self._encoded(store) for store in stores])

    def side_by_side(self) -> Store:
        """All sources' tokens in one store, in the sources' order."""
        if self.kept is None:
            raise ValueError("This layer holds no picture.")
        if len(self.stores) == 1 and self.kept.in_order:
            return self.stores[0]
        return _assembled([self.stores], side_by_side(self.kept, self.device), self.kept.width)

    def _encoded(self, store: Store) -> Store:
        return self.encode(store) if self.encode is not None and isinstance(store, Plain) else store

    # -- batches ---------------------------------------------------------------------------------------------------

    def regroup(
        self, kept: KeptTokens, recipe: Sequence[tuple[ClassParts, int]], layers: Sequence[CrossAttentionLayer]
    ) -> None:
        """Hold what `KeptTokens.regrouped` says, put together from these layers, which may be this one.

        What is held is moved, nothing is encoded again.
        """
        sources, self.device = [layer.stores for layer in layers], layers[0].device
        self._hold(kept, [_assembled(sources, parts, width) for parts, width in recipe])
        self.is_initialized = True

    def hold_nothing(self, kept: KeptTokens, like: CrossAttentionLayer) -> None:
        """Be a layer of samples without pictures, to be joined with one like `like`."""
        sources, self.device = len(kept.order), like.device
        empty = like.stores[0].map(lambda tensor: tensor.new_empty(sources, *tensor.shape[1:-2], 0, tensor.shape[-1]))
        self._hold(kept, [empty])
        self.is_initialized = True

    def _hold(self, kept: KeptTokens, stores: list[Store]) -> None:
        if self.static:
            stores = [self._buffered(*stores)]
        self.kept, self.stores = kept, stores
        self.places = sum(own.index.numel() for own in kept.classes)
        if kept.shared:
            kept.sources_on(self.device)  # copied now, not at the first step
        self.masks, self.gather = kept.masks_on(self.device), kept.gather_on(self.device) if self.decodes else None

    def _buffered(self, store: Store) -> Store:
        """The store in buffers: those that there are if they fit, else new ones."""
        if self._buffers is not None and all(map(_fits, self._buffers.tensors, store.tensors)):
            for buffer, tensor in zip(self._buffers.tensors, store.tensors, strict=True):
                buffer.copy_(tensor)
            return self._buffers
        # Contiguous, at an address that a CUDA graph may rely on, as transformers' static layers do it.
        self._buffers = store.map(torch.Tensor.contiguous)
        for buffer in self._buffers.tensors:
            torch._dynamo.mark_static_address(buffer)
        return self._buffers

    def reset(self) -> None:
        """Forget everything; buffers stay, to be filled again."""
        self.stores, self.masks, self.kept, self.gather = [], [], None, None
        self._new = self._whole = None
        self.is_initialized = False

    def held_tensors(self) -> list[torch.Tensor]:
        """The tensors whose bytes this layer holds, buffers that wait to be filled again among them."""
        stores = [*self.stores, *(store for store in (self._new, self._buffers) if store is not None)]
        return [tensor for store in stores for tensor in store.tensors]


def _assembled(sources: Sequence[Sequence[Store]], parts: ClassParts, width: int) -> Store:
    """One store out of parts of others; the same one where that is a whole store."""
    stores = []
    for layer, number, rows in parts:
        store = sources[layer][number]
        stores.append(store if rows is None else store.take(rows, None))
    return Store.joined(stores, width)


def _fits(buffer: torch.Tensor, tensor: torch.Tensor) -> bool:
    return buffer.shape == tensor.shape and buffer.dtype == tensor.dtype and buffer.device == tensor.device
