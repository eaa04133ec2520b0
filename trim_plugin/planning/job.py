"""What is to be generated, in numbers."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be generated.

    Args:
        batch: samples.
        images: images a sample.
        tiles: real tiles of each image; the model pads every image to its most tiles.
        readable_images: images that the prompt's last row may read; all of them if they are given in a row, 1 in a chat
            with interleaved images.
        prompt_tokens: text tokens of a prompt.
        new_tokens: text tokens generated.
        tower: whether the vision tower reads the images here; False if their features come ready made.
        copies: how often every sample is decoded side by side: beams times returned sequences.
        pixels_on_device: whether the caller has moved `pixel_values` (float32) to the device for the whole batch. They may stay
            on the CPU, whatever the model is on: the tower takes what it reads.

    Raises:
        ValueError: a number is not positive, or more images can be read than there are.

    Example:
        >>> Job(prompt_tokens=10, new_tokens=5).text_tokens
        14
    """

    batch: int = 1
    images: int = 1
    tiles: int = 4
    readable_images: int | None = None
    prompt_tokens: int = 128
    new_tokens: int = 128
    tower: bool = True
    copies: int = 1
    pixels_on_device: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("tower", "pixels_on_device") or value is None:
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}.")
        if self.readable_images is not None and self.readable_images > self.images:
            raise ValueError(f"readable_images must be at most images ({self.images}), got {self.readable_images}.")

    @property
    def text_tokens(self) -> int:
        """Text tokens in the self-attention cache when the last token has been chosen."""
        return self.prompt_tokens + self.new_tokens - 1

    @property
    def sequences(self) -> int:
        """Sequences that are decoded: samples with their copies."""
        return self.batch * self.copies
