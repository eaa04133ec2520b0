import json
import math

import pytest
import torch
from transformers import MllamaForConditionalGeneration

from benchmarks.common.models import transformers_config
from trim_plugin.compat import cache_of
from trim_plugin.integrations.bitsandbytes import SKIPPED
from trim_plugin.planning import configuration, model_sizes

from ..random_models import Sample, random_config, random_inputs, random_model, trimmed


@pytest.mark.parametrize(("shape", "billions"), [("11b", 10.67), ("90b", 88.6)])
def test_built_in_shapes_have_the_published_sizes(shape, billions):
    total = sum(model_sizes.weight_bytes(configuration.built_in_config(shape)).values()) / 2
    assert total == pytest.approx(billions * 1e9, rel=0.005)


@pytest.mark.parametrize("weights", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("which", ["11b", "small pictures", "many heads", "one cross layer"])
def test_every_parameter_of_transformers_model_is_counted(which, weights):
    """The shapes are written down in the planner, so that it needs no transformers; here they are those of its model."""
    config = {
        "11b": lambda: transformers_config("11b"),
        "small pictures": lambda: random_config(image_size=16, vision_width=48),
        "many heads": lambda: random_config(heads=8, kv_heads=1, width=64, layers=7, cross_layers=(0, 2, 6)),
        "one cross layer": lambda: random_config(layers=3, cross_layers=(1,)),
    }[which]()
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config)
    expected = {}
    for name, parameter in model.named_parameters():
        part = model_sizes.model_part(name, set(config.text_config.cross_attention_layers))
        expected[part] = expected.get(part, 0) + parameter.numel()
    found = {}
    for part, times, _, shape in model_sizes.parameters(config):
        found[part] = found.get(part, 0) + times * math.prod(shape)
    assert found == expected
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    linear = {name for name in linear if not name.endswith(SKIPPED)}
    shapes = sorted(tuple(model.get_submodule(name).weight.shape) for name in linear)
    assert shapes == sorted(
        shape
        for _, times, name, shape in model_sizes.parameters(config)
        for _ in range(times)
        if name in model_sizes.QUANTIZED_LAYERS
    )
    # A configuration of transformers' and the numbers read from its JSON say the same.
    read = configuration.read_config(json.loads(config.to_json_string(use_diff=False)))
    assert model_sizes.weight_bytes(read, weights) == model_sizes.weight_bytes(config, weights)


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
