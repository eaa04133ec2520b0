import importlib.util

import pytest
import torch
from accelerate import infer_auto_device_map
from transformers import LlamaConfig, MllamaConfig, MllamaForConditionalGeneration

from trim_plugin.compat import cache_of
from trim_plugin.integrations.accelerate import check_device_map, load
from trim_plugin.integrations.bitsandbytes import weight_memory

from ..random_models import Sample, generate, largest_difference, random_inputs, trimmed
from .conftest import make_adapter

SAMPLES = [Sample((1, (6,), 6)), Sample((2, (3,), 3))]
CONFIG = {"top_k_ratio": 0.25}
TEXT_ON_DISK = {
    "model.vision_model": "cpu",
    "model.multi_modal_projector": "cpu",
    "model.language_model": "disk",
    "lm_head": "cpu",
}
HALF_ON_DISK = {"": "cpu", "model.language_model.layers.2": "disk", "model.language_model.layers.3": "disk"}


@pytest.mark.parametrize("device_map", [TEXT_ON_DISK, HALF_ON_DISK], ids=["text on disk", "half on disk"])
@pytest.mark.parametrize("config", [{"top_k_ratio": 1.0}, CONFIG, CONFIG | {"kv_quantization": "int8"}], ids=str)
def test_offloaded_weights_change_nothing(checkpoint, tmp_path, device_map, config):
    whole, _ = load(checkpoint, "fp32")
    parts, _ = load(checkpoint, "fp32", device_map=device_map, offload_folder=tmp_path)
    assert set(parts.hf_device_map.values()) == {"cpu", "disk"}
    assert weight_memory(parts).offloaded > 0
    inputs = random_inputs(whole, SAMPLES)
    ours, theirs = (trimmed(model, inputs, config) for model in (parts, whole))
    assert largest_difference(ours, theirs) == 0.0
    assert all(
        torch.equal(a, b) for a, b in zip(cache_of(ours).kept_indices, cache_of(theirs).kept_indices, strict=True)
    )


def test_offload_by_memory_limit(checkpoint, tmp_path):
    whole, _ = load(checkpoint, "fp32")
    limit = weight_memory(whole).total // 2
    parts, _ = load(checkpoint, "fp32", max_memory={"cpu": limit}, offload_folder=tmp_path)
    assert "disk" in parts.hf_device_map.values()
    check_device_map(whole, parts.hf_device_map)
    inputs = random_inputs(whole, SAMPLES)
    assert largest_difference(trimmed(parts, inputs, CONFIG), trimmed(whole, inputs, CONFIG)) == 0.0


def test_an_adapter_on_an_offloaded_model(checkpoint, adapters, tmp_path):
    whole, _ = load(checkpoint, "fp32", adapter=adapters)
    parts, _ = load(checkpoint, "fp32", adapter=adapters, device_map=HALF_ON_DISK, offload_folder=tmp_path)
    inputs = random_inputs(whole, SAMPLES)
    assert largest_difference(trimmed(parts, inputs, CONFIG), trimmed(whole, inputs, CONFIG)) == 0.0
    plain, _ = load(checkpoint, "fp32")
    assert largest_difference(trimmed(parts, inputs, CONFIG, 1), trimmed(plain, inputs, CONFIG, 1)) > 1e-2


def test_automatic_placement_of_the_11b_splits_no_block():
    """On pretended devices: two GPUs that are too small, and a CPU; no weight exists."""
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(MllamaConfig()).to(torch.bfloat16)
    blocks = model._no_split_modules
    for limits in ({0: "6GiB", 1: "6GiB", "cpu": "60GiB"}, {0: "3GiB", 1: "9GiB", 2: "11GiB"}):
        placed = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=blocks)
        assert len(set(placed.values())) == 3
        check_device_map(model, placed)
        inside = next(name for name, _ in model.named_parameters() if "layers.3.cross_attn.q_proj" in name)
        with pytest.raises(ValueError, match=r"splits the block 'model.language_model.layers.3'"):
            check_device_map(model, placed | {inside: "disk"})


@pytest.fixture
def no_weights_are_read(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were about to be read")

    monkeypatch.setattr(MllamaForConditionalGeneration, "from_pretrained", refuse)


@pytest.mark.usefixtures("no_weights_are_read")
def test_bad_input_is_found_before_weights_are_read(checkpoint, adapters, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"Unknown weights 'int4'. Allowed: 'fp32'.*'nf4'"):
        load(checkpoint, "int4")
    part = "model.language_model.layers.1.cross_attn.k_proj"
    with pytest.raises(ValueError, match=r"splits the block 'model.language_model.layers.1' \(MllamaCrossAttention"):
        load(checkpoint, "fp32", device_map={"": "cpu", part: "disk"})
    with pytest.raises(ValueError, match=r"leaves out 'lm_head.weight'"):
        load(checkpoint, "fp32", device_map={"model": "cpu"})
    with pytest.raises(ValueError, match="names 'language_model', which the model does not have"):
        load(checkpoint, "fp32", device_map={"": "cpu", "language_model": "disk"})
    with pytest.raises(ValueError, match="cannot be offloaded there"):
        load(checkpoint, "nf4", device_map=HALF_ON_DISK)
    with pytest.raises(ValueError, match="for another architecture"):
        load(checkpoint, "fp32", adapter=make_adapter(tmp_path / "adapter", "cross_attention", 0, width=32))
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        load(checkpoint, "fp32", adapter=tmp_path / "nowhere")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="is a llama model; this needs an Mllama"):
        load(tmp_path / "llama")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)
    )
    with pytest.raises(ImportError, match=r"weights='nf4' needs bitsandbytes.*: pip install bitsandbytes"):
        load(checkpoint, "nf4")


def test_the_model_is_ready(checkpoint):
    model, processor = load(checkpoint, "fp32", device_map=None)
    assert not model.training
    assert type(processor).__name__ == "MllamaProcessor"
    inputs = random_inputs(model, SAMPLES)
    assert torch.equal(generate(model, inputs).sequences, trimmed(model, inputs, {"top_k_ratio": 1.0}).sequences)
