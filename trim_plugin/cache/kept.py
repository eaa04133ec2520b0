"""The record of which visual tokens a cache holds, and how they lie: in width classes, once for all layers.

Every sample that brought pictures is a source. Its copies (beams, returned sequences) read the source's tokens, which are held
once. Sources that keep about as many tokens share a tensor, so that little is padding: a width class.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from trim_plugin.arithmetic import classify
from trim_plugin.selection.select import Columns
from trim_plugin.selection.visibility import add_log_sizes, open_mask, pack


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
        readable: bool (sources, tiles) on the CPU: visible to the last prompt row, kept or not. Decoding reads nothing else.
        tile_tokens: visual tokens of a tile.
        token_bytes: bytes of a visual token's keys and values in one layer, as stock holds them.
        dtype: the masks' dtype.
        sized: whether any token stands for several.
        bucket: widths are multiples of this; 0 unless the cache is static, in which all sources are one class.
    """

    classes: tuple[WidthClass, ...]
    order: tuple[int, ...]
    visible: torch.Tensor
    readable: torch.Tensor
    tile_tokens: int
    token_bytes: int
    dtype: torch.dtype
    sized: bool
    bucket: int = 0

    # -- what it says ---------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Visual tokens of a sample, kept or not."""
        return self.readable.shape[1] * self.tile_tokens

    @property
    def sources(self) -> int:
        """Samples that brought pictures, copies not counted."""
        return self.readable.shape[0]

    @property
    def shared(self) -> bool:
        """Whether samples read the same source."""
        return len(self.order) != self.sources

    @property
    def width(self) -> int:
        """Tokens of the widest class."""
        return max(own.width for own in self.classes)

    @functools.cached_property
    def gather(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Where in the batch the samples of the classes are, row by row and copy by copy, int64 (batch,), and the way back.

        None if they follow each other.
        """
        readers: dict[int, list[int]] = {}
        for sample, source in enumerate(self.order):
            readers.setdefault(source, []).append(sample)
        samples = [sample for own in self.classes for source in own.sources for sample in readers[source]]
        if samples == list(range(len(samples))):
            return None
        back = sorted(range(len(samples)), key=samples.__getitem__)
        places = torch.tensor([samples, back], device=self.classes[0].index.device)
        return places[0], places[1]

    @functools.cached_property
    def closed_rows(self) -> torch.Tensor | None:
        """For a decoding step's rows: (batch, 1, 1, 1) of 0 for samples without pictures, which a cross-attention layer leaves as
        they are, and 1 for others; None if there are none such.
        """
        if all(count for own in self.classes for count in own.counts):
            return None
        seen = [float(count > 0) for count in self.counts()]
        return torch.tensor(seen, dtype=self.dtype, device=self.classes[0].index.device).view(-1, 1, 1, 1)

    @classmethod
    def without_pictures(cls, sources: int, like: KeptTokens) -> KeptTokens:
        """The record of samples of text alone, to stand beside another one's."""
        device = like.classes[0].index.device
        nothing = torch.empty(sources, 0, dtype=torch.long, device=device)
        numbers = tuple(range(sources))
        return dataclasses.replace(
            like,
            classes=(WidthClass(numbers, (0,) * sources, 1, nothing, nothing, None),),
            order=numbers,
            visible=torch.zeros(sources, dtype=torch.long, device=like.visible.device),
            readable=torch.zeros(sources, like.readable.shape[1], dtype=torch.bool),
        )

    @functools.cached_property
    def source_of_sample(self) -> torch.Tensor:
        """`order` as int64 (batch,) on the device."""
        return torch.tensor(self.order, device=self.classes[0].index.device)

    def of_samples(self, name: str) -> list[torch.Tensor]:
        """For every sample what its class's `index` or `sizes` says of the tokens that are kept."""
        rows = {
            source: getattr(own, name)[row, : own.counts[row]]
            for own in self.classes
            for row, source in enumerate(own.sources)
        }
        return [rows[source] for source in self.order]

    def counts(self) -> list[int]:
        """Kept tokens of every sample."""
        of_source = {
            source: count for own in self.classes for source, count in zip(own.sources, own.counts, strict=True)
        }
        return [of_source[source] for source in self.order]

    # -- what becomes of it ----------------------------------------------------------------------------------------

    @classmethod
    def of(
        cls,
        columns: Columns,
        readable: Sequence[int],
        *,
        visible: torch.Tensor,
        tiles: torch.Tensor,
        token_bytes: int,
        dtype: torch.dtype,
        sized: bool,
        bucket: int,
    ) -> tuple[KeptTokens, list[Picked]]:
        """What is held after a turn: of all columns those that decoding can read, every sample its own source.

        Args:
            columns: what the turn's layers attended to.
            readable: how many of its columns every sample keeps.
            visible, token_bytes, dtype, sized, bucket: as for the class.
            tiles: bool (batch, tiles), its `readable`.

        Returns:
            The record, and what of the columns goes into each of its classes.
        """
        found = classify(readable, [1] * len(readable), bucket)
        uploaded = _Uploaded([source for sources, _ in found for source in sources], readable, columns.index.device)
        classes, picked = [], []
        for sources, width in found:
            rows, counts = uploaded.rows(sources), tuple(readable[source] for source in sources)
            own = take(columns.readable & columns.valid, rows)
            index, sizes, positions = take(columns.index, rows), take(columns.sizes, rows), None
            if width != own.shape[1] or min(counts) < width:
                positions = pack(own, longest=width)[0]
                index, sizes = index.gather(1, positions), sizes.gather(1, positions)
            valid = None if min(counts) == width else uploaded.valid(sources, width)
            classes.append(width_class(sources, counts, 1, index, sizes, valid, dtype, sized, bucket))
            picked.append(Picked(rows, positions))
        order = tuple(range(len(readable)))
        return cls(
            tuple(classes), order, visible, tiles, columns.tile_tokens, token_bytes, dtype, sized, bucket
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


def valid_places(counts: Sequence[int], width: int, device: torch.device) -> torch.Tensor:
    """bool (rows, width): the first places of every row, as many as it keeps."""
    if min(counts) == width:
        return torch.ones(len(counts), width, dtype=torch.bool, device=device)
    return torch.arange(width, device=device) < torch.tensor(counts, device=device)[:, None]


class _Uploaded:
    """Sources, class by class, and their counts, copied to the device at once where anything there needs them."""

    def __init__(self, sources: Sequence[int], counts: Sequence[int], device: torch.device) -> None:
        self._sources = list(sources)
        self._counts = [counts[source] for source in sources]
        self._device = device
        self._tensor: torch.Tensor | None = None

    def _of(self, sources: Sequence[int], which: int) -> torch.Tensor:
        if self._tensor is None:
            self._tensor = torch.tensor([self._sources, self._counts], device=self._device)
        start = self._sources.index(sources[0])
        return self._tensor[which, start : start + len(sources)]

    def rows(self, sources: Sequence[int]) -> slice | torch.Tensor:
        """Where these sources lie in a tensor of all."""
        follow = list(sources) == list(range(sources[0], sources[0] + len(sources)))
        return slice(sources[0], sources[0] + len(sources)) if follow else self._of(sources, 0)

    def valid(self, sources: Sequence[int], width: int) -> torch.Tensor:
        """bool (sources, width): the first places of every row, as many as it keeps."""
        return torch.arange(width, device=self._device) < self._of(sources, 1)[:, None]


def take(tensor: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
    """These rows of a tensor."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows.to(tensor.device))
