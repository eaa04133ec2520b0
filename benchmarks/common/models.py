"""The models that are measured: the small trained one, and random ones of the 11B model's shape."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.common.seeds import SEED
from trim_plugin.arithmetic import tile_tokens
from trim_plugin.embedded import SMALL_MODEL
from trim_plugin.planning.configuration import built_in_config

SHAPES = ("small", "11b-layers", "11b-tower", "11b-eighth", "11b")
#: What a model of that shape computes in.
DTYPE = {
    "small": "float32",
    "11b-layers": "bfloat16",
    "11b-tower": "bfloat16",
    "11b-eighth": "bfloat16",
    "11b": "bfloat16",
}


def transformers_config(shape: str) -> MllamaConfig:
    """transformers' configuration of Llama-3.2-Vision, "11b" or "90b".

    Example:
        >>> transformers_config("11b").text_config.num_attention_heads
        32
    """
    numbers = dataclasses.asdict(built_in_config(shape))
    return MllamaConfig(
        vision_config=numbers["vision_config"], text_config=numbers["text_config"] | {"pad_token_id": 128004}
    )


def shape_config(shape: str) -> MllamaConfig:
    """The configuration of a random model: "11b-layers", "11b-tower", "11b-eighth" or "11b".

    "11b-layers" has the text model's real widths, 2 self- and 2 cross-attention layers, and a vocabulary cut in proportion
    (a tenth); its vision tower is a stand-in, see `FeatureTable`. "11b-tower" is the same with a real tower's widths and picture
    size, and one layer of each of the tower's two kinds instead of 32 and 8: little to compute, much to hold. "11b-eighth" has
    the real widths of both, an eighth of the layers of each kind (4 self-attention, 1 cross-attention; 4 local, 1 global in the
    tower, of which one intermediate layer is handed on instead of five), and an eighth of the vocabulary.
    """
    config = transformers_config("11b")
    if shape == "11b-eighth":
        text = config.text_config.to_dict() | {
            "num_hidden_layers": 5,
            "cross_attention_layers": [3],
            "vocab_size": 16032,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        vision = config.vision_config.to_dict() | {
            "num_hidden_layers": 4,
            "num_global_layers": 1,
            "intermediate_layers_indices": [2],
            "vision_output_dim": 2 * config.vision_config.hidden_size,
        }
        return MllamaConfig(vision_config=vision, text_config=text, image_token_index=16032)
    if shape in ("11b-layers", "11b-tower"):
        text = config.text_config.to_dict() | {
            "num_hidden_layers": 4,
            "cross_attention_layers": [1, 3],
            "vocab_size": 12800,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if shape == "11b-tower":
            few = {"num_hidden_layers": 1, "num_global_layers": 1, "intermediate_layers_indices": [0] * 5}
            vision = config.vision_config.to_dict() | few
            return MllamaConfig(vision_config=vision, text_config=text, image_token_index=12800)
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
    if shape == "tiny":
        return _tiny_config()
    if shape != "11b":
        raise ValueError(f"shape must be '11b-layers', '11b-tower', '11b-eighth' or '11b', got {shape!r}")
    return config


def _tiny_config() -> MllamaConfig:
    """Every kind of layer in small: for running a benchmark's code as a test."""
    return MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "attention_heads": 2,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
            "image_size": 56,
            "max_num_tiles": 4,
        },
        text_config={
            "hidden_size": 128,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "cross_attention_layers": [1, 3],
            "vocab_size": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_index=256,
    )


class FeatureTable(nn.Module):
    """Stands in for the vision tower of "11b-layers": random features, so that `generate` runs without its cost."""

    def __init__(self, config: MllamaConfig, dtype: torch.dtype) -> None:
        super().__init__()
        vision = config.vision_config
        self.num_patches, self.max_num_tiles = tile_tokens(vision), vision.max_num_tiles
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
    with no_init_weights(), torch.device(device):
        model = MllamaForConditionalGeneration._from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(2**20 + 7, generator=generator).to(device, dtype)
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
    return finish(model, shape)


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
