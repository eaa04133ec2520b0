"""Encoded pictures as a forward takes them: visual tokens of every sample, padded to a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from trim_plugin.cache.regrouping import padded_join


@dataclasses.dataclass
class EncodedSample:
    """The visual tokens of one sample's pictures.

    `trim_plugin.pictures.encoded.Pictures`, which says what these are, is one with all that is known of its pictures.
    """

    states: torch.Tensor
    index: torch.Tensor
    sizes: torch.Tensor
    total: int

    def check_fits(self, model: torch.nn.Module, known: dict[str, Any] | None = None) -> None:
        """Raise `ValueError` if another model has encoded the pictures, where a subclass knows which one has.

        `known` is what this has found out about the model for other samples of the batch, and is added to.
        """


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """The visual tokens of a batch, padded to the longest sample.

    Args:
        states: (batch, tokens, width), zeros in padding.
        index: int64 (batch, tokens).
        sizes: int64 (batch, tokens), 1 in padding.
        valid: bool (batch, tokens), False in padding.
        total: visual tokens of the sample with most pictures.
        complete: whether every sample has all of `total` tokens, each for itself.
    """

    states: torch.Tensor
    index: torch.Tensor
    sizes: torch.Tensor
    valid: torch.Tensor
    total: int
    complete: bool

    @classmethod
    def of(
        cls, samples: Sequence[EncodedSample], device: torch.device, dtype: torch.dtype, total: int = 0
    ) -> EncodedBatch:
        """Put samples side by side; `total` where others have more.

        Example:
            >>> one = EncodedSample(torch.ones(1, 2), torch.tensor([0]), torch.tensor([3]), 4)
            >>> two = EncodedSample(torch.ones(2, 2), torch.tensor([0, 5]), torch.tensor([1, 1]), 8)
            >>> batch = EncodedBatch.of([one, two], torch.device("cpu"), torch.float32)
            >>> batch.valid.tolist(), batch.total
            ([[True, False], [True, True]], 8)
        """
        longest, total = max(len(sample.index) for sample in samples), max(total, *(one.total for one in samples))

        def padded(name: str, fill: int, dtype: torch.dtype) -> torch.Tensor:
            first = getattr(samples[0], name).device  # put together there, and copied once
            own = [getattr(sample, name)[None].to(first, dtype) for sample in samples]
            return padded_join(own, longest, dim=1, fill=fill).to(device)

        index = padded("index", -1, torch.long)
        return cls(
            states=padded("states", 0, dtype),
            index=index.clamp(min=0),
            sizes=padded("sizes", 1, torch.long),
            valid=index >= 0,
            total=total,
            complete=all(len(sample.index) == total for sample in samples),
        )


def tokens_of_tiles(samples: Sequence[EncodedSample], tiles: int, tile_tokens: int) -> torch.Tensor:
    """int64 (batch, tiles) on the CPU: how many tokens of each tile there are. Reads a device at most once.

    Example:
        >>> one = EncodedSample(torch.ones(2, 2), torch.tensor([0, 5]), torch.tensor([1, 1]), 8)
        >>> tokens_of_tiles([one, one], tiles=2, tile_tokens=4).tolist()
        [[1, 1], [1, 1]]
    """
    first = [number * tiles * tile_tokens for number in range(len(samples))]
    index = torch.cat([sample.index.to(samples[0].index) + start for sample, start in zip(samples, first, strict=True)])
    return torch.bincount(index.cpu() // tile_tokens, minlength=len(samples) * tiles).view(len(samples), tiles)


def check_samples(pictures: Any) -> list[EncodedSample]:
    """A sample's pictures or a batch's, as a list with one entry a sample.

    Raises:
        TypeError: something else than encoded pictures.
        ValueError: none at all.

    Example:
        >>> check_samples(["page.png"])
        Traceback (most recent call last):
        ...
        TypeError: pictures must be what encode_pictures returns, one for every sample of the batch, got str...
    """
    samples = list(pictures) if isinstance(pictures, list | tuple) else [pictures]
    for sample in samples:
        if not isinstance(sample, EncodedSample):
            raise TypeError(
                "pictures must be what encode_pictures returns, one for every sample of the batch, got "
                f"{type(sample).__name__}. Files are read by Pictures.load; a sample without pictures needs a call of its own."
            )
    if not samples:
        raise ValueError("pictures is an empty list. Give one entry for every sample, or leave pictures out.")
    return samples


def check_count(samples: list[EncodedSample], batch: int) -> list[EncodedSample]:
    """The samples, if there is one for each of the batch.

    Raises:
        ValueError: there are more or fewer.
    """
    if len(samples) != batch:
        raise ValueError(
            f"This TrimmedCache was given encoded pictures of {len(samples)} samples, but the forward has {batch}. "
            "Give one entry of pictures for every sample."
        )
    return samples


ENCODED_AND_PIXELS = (
    "This TrimmedCache was given encoded pictures, and the call brings pixel_values as well. A turn's pictures are either "
    "encoded or not: leave pixel_values out, or encode the others too (encode_pictures with rule=None changes nothing)."
)
