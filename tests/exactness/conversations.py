"""Conversations of several turns over small random models."""

from __future__ import annotations

from typing import Any

import torch

from ..random_models import IMAGE_TOKEN, PAD, TILE_COUNTS, TILES, VOCABULARY, Sample, generate

PICTURE_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


class Conversation:
    """Builds the inputs of a conversation as `MllamaProcessor` would for the whole of it.

    Samples of a batch may differ in the first turn only; later turns must be equally long.
    """

    def __init__(self, model: Any, batch: int = 1, seed: int = 0) -> None:
        self.size = model.config.vision_config.image_size
        self.generator = torch.Generator().manual_seed(seed)
        self.ids: list[list[int]] = [[] for _ in range(batch)]
        self.slots: list[list[tuple[int, int]]] = [[] for _ in range(batch)]  # (aspect ratio id or 0, first row)
        self.runs: list[list[int]] = [[] for _ in range(batch)]  # the run of pictures that a slot belongs to
        self.pixels = torch.zeros(batch, 0, TILES, 3, self.size, self.size)
        self.padding = [0] * batch
        self.run = 0

    def say(self, *samples: Sample) -> Conversation:
        """Add a user's turn to every sample."""
        counts = []
        for index, sample in enumerate(samples):
            before = len(self.slots[index])
            for part in sample.parts:
                if isinstance(part, tuple):
                    self.run += 1
                    for ratio in part:
                        self.slots[index].append((ratio, len(self.ids[index])))
                        self.runs[index].append(self.run)
                        self.ids[index].append(IMAGE_TOKEN)
                else:
                    self.ids[index] += torch.randint(3, VOCABULARY, (part,), generator=self.generator).tolist()
            counts.append(len(self.slots[index]) - before)
        for index, count in enumerate(counts):
            self.slots[index] += [(0, 0)] * (max(counts) - count)
            self.runs[index] += [0] * (max(counts) - count)
        shape = (len(samples), max(counts), TILES, 3, self.size, self.size)
        self.pixels = torch.cat([self.pixels, torch.randn(shape, generator=self.generator)], dim=1)
        longest = max(len(ids) + pad for ids, pad in zip(self.ids, self.padding, strict=True))
        if not any(self.padding):
            self.padding = [longest - len(ids) for ids in self.ids]
        return self

    def hear(self, sequences: torch.Tensor) -> Conversation:
        """Add what the model answered."""
        for index, sequence in enumerate(sequences.tolist()):
            self.ids[index] += sequence[len(self.ids[index]) + self.padding[index] :]
        return self

    def inputs(self, earlier_pictures: int = 0) -> dict[str, torch.Tensor]:
        """Inputs for the whole conversation; pictures only from this slot on, as a follow-up needs them."""
        rows = [[PAD] * pad + ids for pad, ids in zip(self.padding, self.ids, strict=True)]
        input_ids = torch.tensor(rows)
        attention_mask = torch.ones_like(input_ids)
        slots = self.pixels.shape[1]
        ratios = torch.zeros(len(rows), slots, dtype=torch.long)
        tiles_mask = torch.zeros(len(rows), slots, TILES, dtype=torch.long)
        tiles_mask[..., 0] = 1
        mask = torch.zeros(*input_ids.shape, slots, TILES, dtype=torch.long)
        for index, pad in enumerate(self.padding):
            attention_mask[index, :pad] = 0
            own = list(zip(self.slots[index], self.runs[index], strict=True))
            for slot, ((ratio, start), run) in enumerate(own):
                if not ratio:
                    continue
                end = min([first for (other, first), its in own if other and its > run], default=len(self.ids[index]))
                tiles = TILE_COUNTS[ratio - 1]
                ratios[index, slot] = ratio
                tiles_mask[index, slot, :tiles] = 1
                mask[index, pad + start : pad + end, slot, :tiles] = 1
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if slots:
            inputs["cross_attention_mask"] = mask
        if slots > earlier_pictures:
            pictures = (self.pixels, ratios, tiles_mask)
            inputs |= {
                name: tensor[:, earlier_pictures:] for name, tensor in zip(PICTURE_INPUTS, pictures, strict=True)
            }
        return inputs


def converse(
    model: Any, cache: Any, turns: list[list[Sample]], seed: int = 0, new: int = 5, **settings: Any
) -> list[Any]:
    """Play a conversation on one cache; returns the conversation's inputs and output of every turn."""
    conversation = Conversation(model, len(turns[0]), seed)
    played = []
    for turn in turns:
        earlier = conversation.pixels.shape[1]
        conversation.say(*turn)
        output = generate(model, conversation.inputs(earlier), new, cache=cache, **settings)
        played.append((conversation.inputs(), output))
        conversation.hear(output.sequences)
    return played
