"""Every combination of weights, adapters and caches against its own untrimmed counterpart."""

import pytest
import torch

from trim_plugin.compat import cache_of
from trim_plugin.integrations.accelerate import load
from trim_plugin.integrations.peft import load_adapters, merge_adapters, switch_adapter

from ..random_models import (
    Sample,
    check_same_up_to_ties,
    generate,
    largest_difference,
    largest_logit,
    random_inputs,
    trimmed,
)
from ..reference_rule import check_kept

SAMPLES = [Sample((1, (6,), 6)), Sample((2, (3,), 3))]
CACHES = {
    "exact": {"top_k_ratio": 1.0},
    "0.25": {"top_k_ratio": 0.25},
    "0.25 int8 KV": {"top_k_ratio": 0.25, "kv_quantization": "int8"},
    "0.25 nf4 KV": {"top_k_ratio": 0.25, "kv_quantization": "nf4"},
}
KV_ERROR = {"0.25 int8 KV": 0.03, "0.25 nf4 KV": 0.4}


def loaded(checkpoint, adapters, weights, adapter):
    # Quantized weights compute in float32 here, so that scores have no ties and sets can be compared exactly.
    model, _ = load(checkpoint, weights, dtype=torch.float32)
    if adapter == "unmerged":
        return load_adapters(model, adapters["first"])
    if adapter == "merged":
        return merge_adapters(load_adapters(model, adapters["first"]))
    if adapter == "switched":
        model = load_adapters(model, adapters)
        switch_adapter(model, "second")
    return model


@pytest.mark.parametrize("adapter", ["none", "unmerged", "merged", "switched"])
@pytest.mark.parametrize("weights", ["fp32", "bf16", "nf4", "int8"])
def test_matrix(checkpoint, adapters, weights, adapter):
    model = loaded(checkpoint, adapters, weights, adapter)
    inputs = random_inputs(model, SAMPLES)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    other = dict(inputs, pixel_values=inputs["pixel_values"] + 1.0)
    stock = generate(model, inputs)
    outputs = {name: trimmed(model, inputs, config) for name, config in CACHES.items()}

    rounding = 1e-5 if model.dtype == torch.float32 else 2**-6
    check_same_up_to_ties(outputs["exact"], stock, rounding * largest_logit(stock))

    kept = {name: [tokens.tolist() for tokens in cache_of(output).kept_indices] for name, output in outputs.items()}
    check_kept(cache_of(outputs["0.25"]).kept_indices, model, inputs, 0.25)
    for name, limit in KV_ERROR.items():
        assert kept[name] == kept["0.25"]
        assert torch.equal(outputs[name].logits[0], outputs["0.25"].logits[0])
        same = outputs[name].sequences[:, -8] == outputs["0.25"].sequences[:, -8]
        ours, theirs = (outputs[way].logits[1][same].float() for way in (name, "0.25"))
        assert (ours - theirs).norm() < limit * theirs.norm()

    for name, config in CACHES.items():
        changed = trimmed(model, other, config, 2)
        assert (changed.logits[0] - outputs[name].logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize("weights", ["fp32", "nf4", "int8"])
def test_switching_and_merging_give_each_adapter_its_own_answers(checkpoint, adapters, weights):
    def answer(model):
        return trimmed(model, inputs, {"top_k_ratio": 0.25}, 4)

    def single(name):
        return load_adapters(load(checkpoint, weights, dtype=torch.float32)[0], adapters[name])

    model = load(checkpoint, weights, dtype=torch.float32)[0]
    inputs = random_inputs(model, SAMPLES)
    base = answer(model)
    alone = {name: answer(single(name)) for name in adapters}
    both = load_adapters(model, adapters)
    for name in ("first", "second", "first"):
        switch_adapter(both, name)
        assert largest_difference(answer(both), alone[name]) == 0.0
        assert (alone[name].logits[0] - base.logits[0]).abs().max() > 1e-2
    # Merging rounds quantized weights anew; their error against the adapted model is that of quantizing, not of a mistake.
    merged = answer(merge_adapters(both, ["first"]))
    error = (merged.logits[0] - alone["first"].logits[0]).norm() / alone["first"].logits[0].norm()
    most = {"fp32": 1e-5, "nf4": 0.35, "int8": 0.1}[weights]
    if weights == "int8":
        # Products of 8 bits saturate on CPUs without VNNI: there the format's own error is twenty times as large.
        exact = answer(load_adapters(load(checkpoint, "fp32", dtype=torch.float32)[0], adapters["first"])).logits[0]
        most = max(most, float((alone["first"].logits[0] - exact).norm() / exact.norm()))
    assert error < most
