import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from trim_plugin import TrimmedCache
from trim_plugin.integrations.peft import (
    PRESETS,
    load_adapters,
    lora_config,
    merge_adapters,
    prepare_qlora,
    switch_adapter,
)

from ..random_models import Sample, generate, largest_difference, random_inputs, random_model, trimmed
from .conftest import make_adapter

SAMPLES = [Sample((1, (6,), 6)), Sample((2, (3,), 3))]


def base():
    return random_model(width=64, vision_width=32)


def test_loading_an_adapter_says_nothing_that_a_user_cannot_mend(tmp_path):
    make_adapter(tmp_path, "cross_attention", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        load_adapters(base(), tmp_path)


@pytest.mark.parametrize(
    ("preset", "per_self_layer", "per_cross_layer"),
    [("cross_attention", 0, 4), ("text_attention", 4, 4), ("text_linear", 7, 7)],
)
def test_presets_name_the_text_tower_only(preset, per_self_layer, per_cross_layer):
    from peft import get_peft_model

    model = get_peft_model(base(), lora_config(preset, rank=2))
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 3 * per_self_layer + 2 * per_cross_layer
    assert all(".language_model.layers." in name for name in adapted)
    assert not any(re.fullmatch(PRESETS[preset], name) for name, _ in base().named_modules() if "vision_model" in name)


def test_overrides():
    config = lora_config("text_attention", rank=4, bias="none", use_rslora=True)
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 8, True)


def test_more_adapters_can_be_loaded_later(adapters):
    model = load_adapters(base(), {"first": adapters["first"]})
    model = load_adapters(model, {"second": adapters["second"]})
    assert model.active_adapter == "second"
    inputs = random_inputs(model, SAMPLES)
    alone = trimmed(load_adapters(base(), adapters["second"]), inputs, {})
    assert largest_difference(trimmed(model, inputs, {}), alone) == 0.0
    with pytest.raises(ValueError, match=r"No adapter 'third' is loaded. Loaded: 'first', 'second'"):
        switch_adapter(model, "third")


def test_merging_several_is_their_weighted_sum(adapters):
    names = list(adapters)
    weight = "model.language_model.layers.1.cross_attn.q_proj.weight"

    def merged(chosen, weights=None):
        return dict(merge_adapters(load_adapters(base(), adapters), chosen, weights).named_parameters())[weight]

    plain = dict(base().named_parameters())[weight]
    first, second = (merged([name]) - plain for name in names)
    assert first.norm() > 1e-3
    assert torch.allclose(merged(names, [0.5, -2.0]), plain + 0.5 * first - 2.0 * second, atol=1e-5)
    with pytest.raises(ValueError, match="a weight for each adapter"):
        merged(names, [1.0])
    with pytest.raises(ValueError, match="No adapter 'third'"):
        merged(["third"])


def test_names_of_older_transformers_are_understood(adapters, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes((adapters["first"] / "adapter_config.json").read_bytes())
    weights = load_file(adapters["first"] / "adapter_model.safetensors")
    old = {
        name.replace("model.model.language_model.", "model.language_model.model."): tensor
        for name, tensor in weights.items()
    }
    assert old.keys() != weights.keys()
    save_file(old, tmp_path / "adapter_model.safetensors")
    inputs = random_inputs(base(), SAMPLES)
    ours, theirs = (trimmed(load_adapters(base(), folder), inputs, {}) for folder in (tmp_path, adapters["first"]))
    assert largest_difference(ours, theirs) == 0.0


def test_an_adapter_for_another_architecture(adapters, tmp_path):
    other = make_adapter(tmp_path / "wide", "cross_attention", 0, width=32)
    with pytest.raises(
        ValueError, match=r"for another architecture: its .*k_proj has 32 inputs and 16 outputs, the model's"
    ):
        load_adapters(base(), other)
    deeper = make_adapter(tmp_path / "deep", "text_attention", 0, layers=6, cross_layers=(1, 3))
    with pytest.raises(ValueError, match=r"for another architecture: it adapts .*layers\.5\.self_attn"):
        load_adapters(base(), deeper)
    model = base()
    with pytest.raises(ValueError, match="another architecture"):
        load_adapters(model, {"good": adapters["first"], "bad": other})
    assert not any("lora" in name for name, _ in model.named_modules())  # checked before anything was loaded


def test_pickles_and_damaged_adapters_are_refused(adapters, tmp_path):
    config = json.loads((adapters["first"] / "adapter_config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"there is no adapter_config.json"):
        load_adapters(base(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"there is no adapter_model\.safetensors"):
        load_adapters(base(), tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises(ValueError, match=r"is in pickle format \(adapter_model\.bin\)"):
        load_adapters(base(), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no header")
    with pytest.raises(ValueError, match="is damaged"):
        load_adapters(base(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(ValueError, match="of type PROMPT_TUNING; only LORA"):
        load_adapters(base(), tmp_path)
    with pytest.raises(ValueError, match="adapters is empty"):
        load_adapters(base(), {})


def test_training_with_hooks_attached_is_untouched(checkpoint, tmp_path):
    """QLoRA in small: gradients with the trimmed cache's hooks on the model equal those without; then it is used trimmed."""
    from trim_plugin.integrations.accelerate import load

    gradients = []
    for attached in (False, True):
        model = load(checkpoint, "nf4", dtype=torch.float32)[0]
        if attached:
            TrimmedCache(model)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = prepare_qlora(model, lora_config("text_attention", rank=2, init_lora_weights=False)).train()
        inputs = random_inputs(model, SAMPLES)
        model(**inputs, labels=inputs["input_ids"].clamp(max=31)).loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all("lora_" in name for name in found)
        gradients.append(found)
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    assert any(float(gradient.norm()) > 0 for gradient in gradients[0].values())
    model.save_pretrained(tmp_path)
    again = load(checkpoint, "nf4", dtype=torch.float32, adapter=tmp_path)[0]
    ours = trimmed(again, inputs, {"top_k_ratio": 1.0})
    assert torch.equal(ours.sequences, generate(again, inputs).sequences)
