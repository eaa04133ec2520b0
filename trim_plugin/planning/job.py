"""The job that memory is planned for: how many samples, images, tiles and text tokens."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be generated.

    Args:
        batch: samples.
        images: images a sample.
        tiles: real tiles of each image; the model pads every image to its most tiles. Several numbers are those of the batch's
            samples, one after the other; a batch of more samples repeats them.
        readable_images: images that the prompt's last row may read; all of them if they are given in a row, 1 in a chat
            with interleaved images.
        prompt_tokens: text tokens of a prompt.
        new_tokens: text tokens generated.
        tower: whether the vision tower reads the images here; False if their features come ready made.
        expand_size: how often every sample is decoded side by side: beams times returned sequences.
        pixels_on_device: whether the caller has moved `pixel_values` (float32) to the device for the whole batch. They may stay
            on the CPU, whatever the model is on: the tower takes what it reads.

    Raises:
        ValueError: a number is not positive, or more images can be read than there are.

    Example:
        >>> Job(prompt_tokens=10, new_tokens=5).text_tokens
        14
        >>> Job(batch=10, tiles=(1, 1, 1, 4)).samples_by_tiles
        {1: 8, 4: 2}
    """

    batch: int = 1
    images: int = 1
    tiles: int | tuple[int, ...] = 4
    readable_images: int | None = None
    prompt_tokens: int = 128
    new_tokens: int = 128
    tower: bool = True
    expand_size: int = 1
    pixels_on_device: bool = False

    def __post_init__(self) -> None:
        if self.tiles == ():
            raise ValueError("tiles must be a positive integer, or one for each sample, got ().")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("tower", "pixels_on_device") or value is None:
                continue
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, int) or number < 1:
                    raise ValueError(f"{field.name} must be a positive integer, got {number!r}.")
        if self.readable_images is not None and self.readable_images > self.images:
            raise ValueError(f"readable_images must be at most images ({self.images}), got {self.readable_images}.")

    @property
    def samples_by_tiles(self) -> dict[int, int]:
        """How many samples of the batch have images of so many real tiles."""
        given = self.tiles if isinstance(self.tiles, tuple) else (self.tiles,)
        rounds, rest = divmod(self.batch, len(given))
        found: dict[int, int] = {}
        for place, tiles in enumerate(given):
            found[tiles] = found.get(tiles, 0) + rounds + (place < rest)
        return {tiles: samples for tiles, samples in found.items() if samples}

    @property
    def most_tiles(self) -> int:
        """Real tiles of an image of the fullest sample."""
        return max(self.samples_by_tiles)

    @property
    def text_tokens(self) -> int:
        """Text tokens in the self-attention cache when the last token has been chosen."""
        return self.prompt_tokens + self.new_tokens - 1

    @property
    def sequences(self) -> int:
        """Sequences that are decoded: samples times the expand size."""
        return self.batch * self.expand_size
