"""Copies of a sample, as beams and several returned sequences are, read one and the same picture: it is held once."""

from __future__ import annotations

import torch


class SourceMap:
    """Which entry of the cross-attention layers every sample of a batch reads. One for a cache, shared by its layers.

    Example:
        >>> sources = SourceMap()
        >>> sources.repeat(2, batch=2)
        >>> sources.spread(torch.tensor([[5], [7]])).flatten().tolist()
        [5, 5, 7, 7]
        >>> sources.select(torch.tensor([3, 0]))
        >>> sources.spread(torch.tensor([[5], [7]])).flatten().tolist()
        [7, 5]
    """

    def __init__(self) -> None:
        #: int64 (batch,): the entry of every sample; None where each sample has an entry of its own.
        self.of_sample: torch.Tensor | None = None

    @property
    def shared(self) -> bool:
        """Whether samples may share entries."""
        return self.of_sample is not None

    def repeat(self, repeats: int, batch: int) -> None:
        """Every sample of a batch stands `repeats` times in a row from now on."""
        before = torch.arange(batch) if self.of_sample is None else self.of_sample
        self.of_sample = before.repeat_interleave(repeats)

    def select(self, samples: torch.Tensor) -> None:
        """The batch consists of these samples, int64 (new batch,) or bool (batch,), from now on. Entries stay where they are."""
        if samples.dtype == torch.bool:
            samples = samples.nonzero()[:, 0]
        self.of_sample = samples if self.of_sample is None else self.of_sample[samples.to(self.of_sample.device)]

    def compacted(self) -> torch.Tensor | None:
        """int64: the entries that are still read, which the layers shall hold alone from now on; None if that is nothing new."""
        if self.of_sample is None:
            return None
        entries, renumbered = self.of_sample.unique(return_inverse=True)
        in_order = len(entries) == len(renumbered)
        if in_order:
            entries = self.of_sample
        self.of_sample = None if in_order else renumbered
        return entries

    def spread(self, entries: torch.Tensor) -> torch.Tensor:
        """Turn a value for every entry, (entries, ...), into one for every sample, (batch, ...).

        Without a copy where one entry serves the whole batch, or every sample its own.
        """
        if self.of_sample is None:
            return entries
        if entries.shape[0] == 1:
            return entries.expand(len(self.of_sample), *[-1] * (entries.ndim - 1))
        return entries.index_select(0, self.of_sample.to(entries.device))
