"""Encoded pictures as a forward takes them: visual tokens of every sample, padded to a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from trim_plugin.cache.kept import first_places
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
    def of(cls, samples: Sequence[EncodedSample], device: torch.device, dtype: torch.dtype) -> EncodedBatch:
        """Put samples side by side.

        Example:
            >>> one = EncodedSample(torch.ones(1, 2), torch.tensor([0]), torch.tensor([3]), 4)
            >>> two = EncodedSample(torch.ones(2, 2), torch.tensor([0, 5]), torch.tensor([1, 1]), 8)
            >>> batch = EncodedBatch.of([one, two], torch.device("cpu"), torch.float32)
            >>> batch.valid.tolist(), batch.total
            ([[True, False], [True, True]], 8)
        """
        longest = max(len(sample.index) for sample in samples)

        def padded(name: str, fill: int, dtype: torch.dtype) -> torch.Tensor:
            own = [getattr(sample, name)[None].to(device, dtype) for sample in samples]
            return padded_join(own, longest, dim=1, fill=fill)

        lengths = torch.tensor([len(sample.index) for sample in samples], device=device)
        total = max(sample.total for sample in samples)
        return cls(
            states=padded("states", 0, dtype),
            index=padded("index", 0, torch.long),
            sizes=padded("sizes", 1, torch.long),
            valid=first_places(lengths, longest),
            total=total,
            complete=all(len(sample.index) == total for sample in samples),
        )


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
