from types import SimpleNamespace

import pytest
import torch

from trim_plugin.compat import cache_of
from trim_plugin.planning import model_sizes

from ..random_models import Sample, random_config, random_inputs, random_model, trimmed


@pytest.mark.parametrize(("shape", "billions"), [("11b", 10.67), ("90b", 88.6)])
def test_built_in_shapes_have_the_published_sizes(shape, billions):
    total = sum(model_sizes.weight_bytes(model_sizes.built_in_config(shape)).values()) / 2
    assert total == pytest.approx(billions * 1e9, rel=0.005)


def test_weights_equal_a_models(model):
    planned = model_sizes.weight_bytes(model.config, "fp32")
    assert sum(planned.values()) == sum(parameter.nbytes for parameter in model.parameters())
    text = model.model.language_model
    crossing = sum(p.nbytes for index in (1, 3) for p in text.layers[index].parameters())
    assert planned["cross-attention layers"] == crossing


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_quantized_weights_are_within_one_percent(weights, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    presets = pytest.importorskip("trim_plugin.integrations.bitsandbytes")
    assert bitsandbytes
    model = random_model(width=256, heads=4).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=presets.quantization_config(weights)
    )
    measured = presets.weight_memory(loaded).total
    assert sum(model_sizes.weight_bytes(model.config, weights).values()) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("kv", ["int8", "nf4"])
def test_quantized_caches_are_exact_to_the_byte(kv, model):
    pytest.importorskip("bitsandbytes")
    inputs = random_inputs(model, [Sample((1, (6,), 5))])
    report = cache_of(trimmed(model, inputs, {"top_k_ratio": 1.0, "kv_quantization": kv}, 3)).report()
    assert model_sizes.cross_kv_bytes(model.config, 1, 20, kv) == report.cross_kv_bytes


def test_parts_of_unknown_names():
    assert model_sizes.part_of("model.language_model.norm.weight", {1}) == "other"
    assert SimpleNamespace(**model_sizes.weight_bytes(random_config())).lm_head > 0
