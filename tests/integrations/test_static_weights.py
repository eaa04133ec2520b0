"""The static cache on quantized weights: compiled where transformers compiles the quantizer, eager and equal elsewhere."""

from __future__ import annotations

import pytest
import torch
from transformers import MllamaForConditionalGeneration

from trim_plugin import compat

from ..cache.test_static import graph_counter
from ..random_models import Sample, largest_difference, random_inputs, trimmed

SETTINGS = {"top_k_ratio": 0.25, "static": True, "static_bucket": 32, "max_cache_len": 64}
PICTURES = [[Sample((1, (6,), 6))], [Sample((2, (1,), 4))]]

pytestmark = pytest.mark.skipif(
    not compat.compiles_mllama_decoding(), reason="this transformers does not compile Mllama's decoding"
)


def check_pictures(model, compile_config, **more):
    """Both pictures, static and compiled if transformers allows it, give what the dynamic cache gives."""
    for samples in PICTURES:
        inputs = random_inputs(model, samples)
        dynamic = trimmed(model, inputs, {"top_k_ratio": 0.25, **more}, 12)
        static = trimmed(model, inputs, {**SETTINGS, **more}, 12, compile_config=compile_config)
        assert torch.equal(dynamic.sequences, static.sequences)
        assert largest_difference(dynamic, static) <= 1e-5


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_bitsandbytes_weights_are_decoded_eagerly(weights, checkpoint):
    """Transformers does not compile bitsandbytes' quantizers: it warns, and the static cache works all the same."""
    pytest.importorskip("bitsandbytes")
    from trim_plugin.integrations.accelerate import load
    from trim_plugin.integrations.bitsandbytes import use_standard_layout

    torch._dynamo.reset()
    model, _ = load(checkpoint, weights, device_map=None, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    use_standard_layout(
        model
    )  # some CPUs' fast kernel rounds to bfloat16, which 1e-7 of another width's sums can tip over
    compile_config, graphs = graph_counter()
    check_pictures(model, compile_config)
    assert not graphs


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kv_quantization", [None, "int8"])
def test_torchao_weights_are_compiled_once(bits, kv_quantization, checkpoint):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    torch._dynamo.reset()
    four_bit = quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=quantization.granularity.PerGroup(32)
    )
    model = MllamaForConditionalGeneration.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        quantization_config=TorchAoConfig(
            four_bit if bits == 4 else quantization.Int8WeightOnlyConfig(),
            modules_to_not_convert=["vision_model", "multi_modal_projector", "lm_head"],
        ),
    ).eval()
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    assert type(weight) is not torch.nn.Parameter
    model.generation_config.eos_token_id = None
    compile_config, graphs = graph_counter()
    check_pictures(model, compile_config, kv_quantization=kv_quantization)
    assert len(graphs) == 1
