"""The record of which visual tokens a cache holds, and how they lie: in width classes, once for all layers.

Every sample that brought pictures is a source. Its copies (beams, returned sequences) read the source's tokens, which are held
once. Sources that keep about as many tokens share a tensor, so that little is padding: a width class.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trim_plugin.arithmetic import classify
from trim_plugin.selection.select import Columns
from trim_plugin.selection.visibility import add_log_sizes, is_open, open_mask, pack


@dataclasses.dataclass(frozen=True)
class WidthClass:
    """Sources that share a tensor in every cross-attention layer.

    Args:
        sources: their numbers, in the order of the tensor's rows.
        counts: how many visual tokens each has kept; what follows in its row is padding.
        copies: how many samples of the batch read each of them.
        index: int64 (rows, width), the visual token behind every place, ascending.
        sizes: int64 (rows, width), how many visual tokens each stands for; 1 in padding.
        mask: additive (rows, 1, 1, width), what a decoding step's row is given: padding closed, log sizes added. None where
            nothing is padding and all sizes are 1. Made at prefill, so that decoding neither reads the host nor branches on data.
    """

    sources: tuple[int, ...]
    counts: tuple[int, ...]
    copies: int
    index: torch.Tensor
    sizes: torch.Tensor
    mask: torch.Tensor | None

    @property
    def width(self) -> int:
        """Places of a row."""
        return self.index.shape[1]

    @property
    def valid(self) -> torch.Tensor:
        """bool (rows, width), False for padding."""
        if self.mask is None or min(self.counts) == self.width:
            return torch.ones_like(self.index, dtype=torch.bool)
        return is_open(self.mask[:, 0, 0])


@dataclasses.dataclass(frozen=True)
class Picked:
    """What becomes one width class: the rows of what was held, and which tokens of each."""

    rows: slice | torch.Tensor
    positions: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class KeptTokens:
    """Which visual tokens the cross-attention layers hold, of which sample, and who reads them.

    Args:
        classes: the width classes; every source is in one.
        order: the source of every sample of the batch.
        visible: int64 (sources,), visual tokens that at least one query row may read.
        readable_tiles: bool (sources, tiles) on the CPU: visible to the last prompt row, kept or not. Decoding reads no other.
        tile_tokens: visual tokens of a tile.
        token_bytes: bytes of a visual token's keys and values in one layer, as stock holds them.
        dtype: the masks' dtype.
        sized: whether any token stands for several.
        bucket: widths are multiples of this; 0 unless the cache is static, in which all sources are one class.
    """

    classes: tuple[WidthClass, ...]
    order: tuple[int, ...]
    visible: torch.Tensor
    readable_tiles: torch.Tensor
    tile_tokens: int
    token_bytes: int
    dtype: torch.dtype
    sized: bool
    bucket: int = 0
    #: What follows from it and is read on a device, by name and device: held there once, however many layers read it.
    _there: dict[tuple[str, torch.device], Any] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    # -- what it says ---------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Visual tokens of a sample, kept or not."""
        return self.readable_tiles.shape[1] * self.tile_tokens

    @property
    def sources(self) -> int:
        """Samples that brought pictures, copies not counted."""
        return self.readable_tiles.shape[0]

    @property
    def shared(self) -> bool:
        """Whether samples read the same source."""
        return len(self.order) != self.sources

    @property
    def width(self) -> int:
        """Tokens of the widest class."""
        return max(own.width for own in self.classes)

    @functools.cached_property
    def _by_class(self) -> list[int] | None:
        """The samples class by class, row by row and copy by copy; None if that is the batch's order."""
        readers: dict[int, list[int]] = {}
        for sample, source in enumerate(self.order):
            readers.setdefault(source, []).append(sample)
        samples = [sample for own in self.classes for source in own.sources for sample in readers[source]]
        return None if samples == list(range(len(samples))) else samples

    @property
    def in_order(self) -> bool:
        """Whether the samples of the classes, row by row and copy by copy, are the batch as it is."""
        return self._by_class is None

    # -- what of it is read on a device ----------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where it was made."""
        return self.classes[0].index.device

    def once(self, name: str, device: torch.device, make: Callable[[], Any]) -> Any:
        """What `make` returns, made the first time that it is asked for on a device."""
        if (name, device) not in self._there:
            self._there[name, device] = make()
        return self._there[name, device]

    def _numbers_on(self, device: torch.device) -> torch.Tensor:
        """int64 (1 or 3, batch), copied at once: each sample's source, and what `gather_on` returns."""
        if device != self.device:
            return self.once("numbers", device, lambda: self._numbers_on(self.device).to(device))
        rows, samples = [list(self.order)], self._by_class
        if samples is not None:
            rows += [samples, sorted(range(len(samples)), key=samples.__getitem__)]
        return self.once("numbers", device, lambda: torch.tensor(rows, device=device))

    def sources_on(self, device: torch.device) -> torch.Tensor:
        """`order` as int64 (batch,)."""
        return self._numbers_on(device)[0]

    def gather_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Where in the batch the samples of the classes are, row by row and copy by copy, int64 (batch,), and the way back.

        None if they follow each other.
        """
        return None if self.in_order else tuple(self._numbers_on(device)[1:])

    def masks_on(self, device: torch.device) -> list[torch.Tensor | None]:
        """Each class's `mask`."""
        masks = [own.mask for own in self.classes]
        return self.once("masks", device, lambda: [None if mask is None else mask.to(device) for mask in masks])

    @functools.cached_property
    def all_read(self) -> bool:
        """Whether every sample has tokens to read."""
        return all(self.count_of.values())

    def closed_rows_on(self, device: torch.device) -> torch.Tensor:
        """For a decoding step's rows: (batch, 1, 1, 1) of 0 for samples without pictures, which a cross-attention layer leaves as
        they are, and 1 for others."""
        seen = [float(count > 0) for count in self.counts()]
        return self.once(
            "closed rows", device, lambda: torch.tensor(seen, dtype=self.dtype, device=device).view(-1, 1, 1, 1)
        )

    @classmethod
    def without_pictures(cls, sources: int, like: KeptTokens) -> KeptTokens:
        """The record of samples of text alone, to stand beside another one's."""
        nothing = torch.empty(sources, 0, dtype=torch.long, device=like.device)
        numbers = tuple(range(sources))
        return dataclasses.replace(
            like,
            classes=(WidthClass(numbers, (0,) * sources, 1, nothing, nothing, None),),
            order=numbers,
            visible=torch.zeros(sources, dtype=torch.long, device=like.visible.device),
            readable_tiles=torch.zeros(sources, like.readable_tiles.shape[1], dtype=torch.bool, device="cpu"),
        )

    def per_sample(self, name: str) -> list[torch.Tensor]:
        """For every sample what its class's `index` or `sizes` says of the tokens that are kept."""
        rows = {
            source: getattr(own, name)[row, : own.counts[row]]
            for own in self.classes
            for row, source in enumerate(own.sources)
        }
        return [rows[source] for source in self.order]

    @functools.cached_property
    def count_of(self) -> dict[int, int]:
        """Kept tokens of every source."""
        return {source: count for own in self.classes for source, count in zip(own.sources, own.counts, strict=True)}

    def counts(self) -> list[int]:
        """Kept tokens of every sample."""
        return [self.count_of[source] for source in self.order]

    # -- what becomes of it ----------------------------------------------------------------------------------------

    @classmethod
    def of(
        cls,
        columns: Columns,
        kept_counts: Sequence[int],
        *,
        visible: torch.Tensor,
        readable_tiles: torch.Tensor,
        token_bytes: int,
        dtype: torch.dtype,
        sized: bool,
        bucket: int,
    ) -> tuple[KeptTokens, list[Picked]]:
        """What is held after a turn: of all columns those that decoding can read, every sample its own source.

        Args:
            columns: what the turn's layers attended to.
            kept_counts: how many of its columns every sample keeps.
            visible, token_bytes, dtype, sized, bucket: as for the class.
            readable_tiles: bool (batch, tiles).

        Returns:
            The record, and what of the columns goes into each of its classes.
        """
        found = [(tuple(range(len(kept_counts))), kept_counts[0])]  # a uniform batch is one class
        if bucket or len(set(kept_counts)) > 1:
            found = classify(kept_counts, [1] * len(kept_counts), bucket)
        uploaded = Uploaded(columns.index.device)
        planned = [
            (uploaded.rows(sources), uploaded.add([kept_counts[source] for source in sources])) for sources, _ in found
        ]
        classes, picked = [], []
        for (sources, width), (rows_there, counts_there) in zip(found, planned, strict=True):
            rows, counts = rows_there(), tuple(kept_counts[source] for source in sources)
            own = take(columns.readable & columns.valid, rows)
            index, sizes, positions = take(columns.index, rows), take(columns.sizes, rows), None
            if width != own.shape[1] or min(counts) < width:
                positions = pack(own, longest=width)[0]
                index, sizes = index.gather(1, positions), sizes.gather(1, positions)
            valid = None if min(counts) == width else first_places(counts_there(), width)
            classes.append(width_class(sources, counts, 1, index, sizes, valid, dtype, sized, bucket))
            picked.append(Picked(rows, positions))
        order = tuple(range(len(kept_counts)))
        return cls(
            tuple(classes), order, visible, readable_tiles, columns.tile_tokens, token_bytes, dtype, sized, bucket
        ), picked


def width_class(
    sources: Sequence[int],
    counts: tuple[int, ...],
    copies: int,
    index: torch.Tensor,
    sizes: torch.Tensor,
    valid: torch.Tensor | None,
    dtype: torch.dtype,
    sized: bool,
    bucket: int,
) -> WidthClass:
    """The class, with its mask; `valid` is None where nothing is padding. A static cache's mask is there at any time, since its
    padding comes and goes.
    """
    mask = None
    if sized or bucket or valid is not None:
        if valid is not None:
            sizes = sizes.masked_fill(~valid, 1)
        mask = open_mask(torch.ones_like(index, dtype=torch.bool) if valid is None else valid, 1, dtype)
        mask = add_log_sizes(mask, sizes) if sized else mask
    return WidthClass(tuple(sources), counts, copies, index, sizes, mask)


def first_places(counts: torch.Tensor, width: int) -> torch.Tensor:
    """bool (rows, width): the first places of every row, as many as it keeps, int64 (rows,)."""
    return torch.arange(width, device=counts.device) < counts[:, None]


class Uploaded:
    """Lists of whole numbers that are copied to a device together, once any of them is needed there.

    Example:
        >>> uploaded = Uploaded(torch.device("cpu"))
        >>> counts, neighbours, others = uploaded.add([5, 7]), uploaded.rows([1, 2]), uploaded.rows([0, 2])
        >>> counts(), neighbours(), others()
        (tensor([5, 7]), slice(1, 3, None), tensor([0, 2]))
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._numbers: list[int] = []
        self._tensor: torch.Tensor | None = None

    def add(self, numbers: Sequence[int]) -> Callable[[], torch.Tensor]:
        """Note a list, before the first is needed; returns what gives it on the device."""
        start, end = len(self._numbers), len(self._numbers) + len(numbers)
        self._numbers += numbers

        def there() -> torch.Tensor:
            if self._tensor is None:
                self._tensor = torch.tensor(self._numbers, device=self._device)
            return self._tensor[start:end]

        return there

    def rows(self, rows: Sequence[int]) -> Callable[[], slice | torch.Tensor]:
        """Note row numbers of a tensor; returns what gives them, a slice where they follow each other, which needs no copy."""
        if list(rows) == list(range(rows[0], rows[0] + len(rows))):
            return lambda: slice(rows[0], rows[0] + len(rows))
        return self.add(rows)


def take(tensor: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
    """These rows of a tensor."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows.to(tensor.device))


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
