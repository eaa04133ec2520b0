"""What the benchmarks share: environment, files, scenarios, models and greedy decoding."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutput

import trim_plugin
from trim_plugin.embedded import SMALL_MODEL
from trim_plugin.planning.model_sizes import built_in_config, tile_tokens

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PICTURES = ROOT / "docs" / "assets"
SHAPES = ("small", "11b-layers", "11b")
SEED = 0


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


def environment(device: str = "cpu") -> dict[str, Any]:
    """Where and with what the figures were measured."""
    packages = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name in ("bitsandbytes", "peft"):
        try:
            packages[name] = __import__("importlib.metadata", fromlist=["version"]).version(name)
        except ModuleNotFoundError:
            packages[name] = None
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "trim_plugin": trim_plugin.__version__,
        "python": platform.python_version(),
        **packages,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "seed": SEED,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a benchmark's result as JSON; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def read_result(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """A benchmark's result, or None if it was never run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def seed_everything(seed: int = SEED) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def shape_config(shape: str) -> MllamaConfig:
    """The configuration of a random model: "11b-layers" or "11b".

    "11b-layers" has the text model's real widths, 2 self- and 2 cross-attention layers, and a vocabulary cut in proportion
    (a tenth); its vision tower is a stand-in, see `FeatureTable`.
    """
    config = built_in_config("11b")
    if shape == "11b-layers":
        text = config.text_config.to_dict() | {
            "num_hidden_layers": 4,
            "cross_attention_layers": [1, 3],
            "vocab_size": 12800,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        vision = config.vision_config.to_dict() | {
            "hidden_size": 32,
            "attention_heads": 2,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        }
        return MllamaConfig(vision_config=vision, text_config=text, image_token_index=12800)
    if shape != "11b":
        raise ValueError(f"shape must be '11b-layers' or '11b', got {shape!r}")
    return config


class FeatureTable(nn.Module):
    """Stands in for the vision tower of "11b-layers": random features, so that `generate` runs without its cost."""

    def __init__(self, config: MllamaConfig, dtype: torch.dtype) -> None:
        super().__init__()
        vision = config.vision_config
        self.num_patches, self.max_num_tiles = tile_tokens(config), vision.max_num_tiles
        generator = torch.Generator().manual_seed(SEED)
        features = torch.randn(self.max_num_tiles, self.num_patches, vision.vision_output_dim, generator=generator)
        self.register_buffer("features", features.to(dtype), persistent=False)

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutput:
        """Features (batch, images, tiles, patches, width)."""
        batch, images = pixel_values.shape[:2]
        return BaseModelOutput(last_hidden_state=self.features.expand(batch, images, -1, -1, -1))


def random_model(shape: str, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A model of that shape with random weights: good for speed, memory and exactness, never for quality."""
    config = shape_config(shape)
    with no_init_weights():
        model = MllamaForConditionalGeneration._from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(2**20 + 7, generator=generator).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                flat = parameter.view(-1)
                scale = 1 / parameter.shape[-1] ** 0.5
                for start in range(0, flat.numel(), len(noise)):
                    part = flat[start : start + len(noise)]
                    torch.mul(noise[: len(part)], scale, out=part)
            else:
                parameter.fill_(0.5 if "gate" in name else 0.0 if name.endswith("bias") else 1.0)
    return finish(model.to(device), shape)


def finish(model: Any, shape: str) -> Any:
    """Put the stand-in for the vision tower in, and let generation run on whatever random weights say."""
    if shape == "11b-layers":
        table = FeatureTable(model.config, model.lm_head.weight.dtype)
        model.model.vision_model = table.to(model.lm_head.weight.device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def load_shape(shape: str, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The small trained model, or a random one."""
    if shape != "small":
        return random_model(shape, dtype, device)
    model = MllamaForConditionalGeneration.from_pretrained(SMALL_MODEL, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None
    return model


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


class Decoding:
    """Greedy decoding, one forward at a time, as `generate` calls the model but without its own overhead."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor], cache: Any) -> None:
        self.model, self.cache = model, cache
        self._inputs, self._mask = inputs, inputs["attention_mask"]
        self._cross_mask = inputs["cross_attention_mask"][:, -1:]
        self.token: torch.Tensor | None = None

    @torch.no_grad()
    def prefill(self) -> torch.Tensor:
        """Read the prompt; returns the first tokens (batch, 1)."""
        output = self.model(**self._inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = output.logits[:, -1:].argmax(-1)
        return self.token

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """One more token for every sample, (batch, 1)."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        output = self.model(
            input_ids=self.token,
            attention_mask=self._mask,
            cross_attention_mask=self._cross_mask,
            position_ids=self._mask.sum(dim=1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.token = output.logits[:, -1:].argmax(-1)
        return self.token


def stock_cache(model: Any) -> Any:
    """The cache that stock `generate` makes."""
    return transformers.DynamicCache(config=model.config.get_text_config(decoder=True))


def synchronize(device: str) -> None:
    """Wait for the GPU, if there is one."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def bootstrap(samples: np.ndarray, statistic: Callable[[np.ndarray], Any], draws: int = 1000) -> tuple[float, float]:
    """95 % interval of a statistic by resampling the rows of `samples`."""
    rng = np.random.default_rng(SEED)
    found = [statistic(samples[rng.integers(len(samples), size=len(samples))]) for _ in range(draws)]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
