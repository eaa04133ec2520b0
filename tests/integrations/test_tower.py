"""Merging inside the vision tower, with weights that are quantized or offloaded, and with adapters on the text model."""

import pytest
import torch

from trim_plugin.integrations.accelerate import load
from trim_plugin.integrations.peft import load_adapters

from ..exactness.test_tower import BATCH, SHARE, TILES, replaced_by_means, tokens_seen
from ..random_models import largest_difference, random_inputs, trimmed

#: Nothing is chosen behind the tower: members of its groups are equal there, so that rounding would decide which one is kept.
UNTOUCHED = {"top_k_ratio": 1.0}
CONFIG = {**UNTOUCHED, "tower_share": SHARE}
#: The patch embedding stays: stock asks its weight for the device that pixels go to.
TOWER_ON_DISK = {"": "cpu"} | dict.fromkeys(
    ["model.vision_model.transformer", "model.vision_model.global_transformer"], "disk"
)
HALF_ON_DISK = {"": "cpu", "model.vision_model.transformer.layers.1": "disk", "model.language_model.layers.2": "disk"}


def tower_of(model):
    return next(module for name, module in model.named_modules() if name.endswith("vision_model"))


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("weights", ["fp32", "nf4", "int8"])
def test_equals_the_restatement(checkpoint, adapters, weights, adapter):
    model, _ = load(checkpoint, weights, dtype=torch.float32)
    if adapter:
        model = load_adapters(model, adapters["first"])
    inputs = random_inputs(model, BATCH)
    with tokens_seen(tower_of(model)) as seen:
        ours = trimmed(model, inputs, CONFIG)
    with replaced_by_means(tower_of(model), SHARE):
        theirs = trimmed(model, inputs, UNTOUCHED)
    assert min(seen) < max(seen) == TILES * 8
    # Kernels of quantized weights round activations: noise of 1e-6 in an untouched tower moves its logits by half a percent.
    tolerance = 1e-5 if weights == "fp32" else 0.02
    first, other = ours.logits[0], theirs.logits[0]
    assert float((first - other).norm() / other.norm()) <= tolerance


@pytest.mark.parametrize("device_map", [TOWER_ON_DISK, HALF_ON_DISK], ids=["tower on disk", "a layer on disk"])
def test_an_offloaded_tower(checkpoint, tmp_path, device_map):
    whole, _ = load(checkpoint, "fp32")
    parts, _ = load(checkpoint, "fp32", device_map=device_map, offload_folder=tmp_path)
    inputs = random_inputs(whole, BATCH)
    with tokens_seen(tower_of(parts)) as seen:
        ours = trimmed(parts, inputs, CONFIG)
    assert min(seen) < max(seen)
    assert largest_difference(ours, trimmed(whole, inputs, CONFIG)) == 0.0
