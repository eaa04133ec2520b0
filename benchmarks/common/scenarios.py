"""What a user asks of a model, and the inputs that ask it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from benchmarks.common.models import FeatureTable
from benchmarks.common.seeds import SEED


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What a user asks: `images` of `tiles` tiles each, in a row or with text between them, and a question."""

    name: str
    title: str
    images: int
    tiles: int
    interleaved: bool = False
    text: int = 48

    @property
    def readable(self) -> int:
        """Images that the prompt's last row may read."""
        return 1 if self.interleaved else self.images


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("photo", "one small photo (1 tile)", 1, 1),
        Scenario("page", "one document page (4 tiles)", 1, 4),
        Scenario("pages", "8 pages in a row", 8, 4),
        Scenario("chat", "chat with 4 interleaved images", 4, 4, interleaved=True),
        Scenario("video", "32 video frames (1 tile each)", 32, 1),
    )
}


def scenario_inputs(model: Any, scenario: Scenario, batch: int, seed: int = SEED) -> dict[str, torch.Tensor]:
    """Inputs for `generate` of that scenario, random text and pixels, as `MllamaProcessor` lays them out."""
    config, device = model.config, model.lm_head.weight.device
    vision, image_token = config.vision_config, config.image_token_index
    generator = torch.Generator().manual_seed(seed)
    every = scenario.text // scenario.images if scenario.interleaved else 0
    ids, starts = [1], []
    for _ in range(scenario.images):
        starts.append(len(ids))
        ids.append(image_token)
        ids += torch.randint(8, config.text_config.vocab_size - 1, (every,), generator=generator).tolist()
    rest = scenario.text - every * scenario.images
    ids += torch.randint(8, config.text_config.vocab_size - 1, (rest,), generator=generator).tolist()
    tiles = torch.zeros(len(ids), scenario.images, vision.max_num_tiles, dtype=torch.long)
    for image, start in enumerate(starts):
        end = starts[image + 1] if scenario.interleaved and image + 1 < scenario.images else len(ids)
        tiles[start:end, image, : scenario.tiles] = 1
    side = 1 if isinstance(model.model.vision_model, FeatureTable) else vision.image_size
    ratios = {(1, 1): 1, (2, 2): 6}
    layout = (1, 1) if scenario.tiles == 1 else (2, 2)
    pixels = torch.randn(1, scenario.images, vision.max_num_tiles, 3, side, side, generator=generator)
    one = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": pixels.to(model.dtype),
        "aspect_ratio_ids": torch.full((1, scenario.images), ratios[layout]),
        "aspect_ratio_mask": (torch.arange(vision.max_num_tiles) < scenario.tiles)
        .long()
        .expand(1, scenario.images, -1),
        "cross_attention_mask": tiles[None],
    }
    return {name: tensor.repeat(batch, *[1] * (tensor.ndim - 1)).to(device) for name, tensor in one.items()}
