"""The rows of docs/errors.md about settings."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.mllama.modeling_mllama import MllamaTextModel

from trim_plugin import TopKPerHead, TrimmedCache
from trim_plugin.compat import CACHE, UnsupportedTransformersError

from ..random_models import generate, random_inputs, random_model, trimmed
from .checks import SAMPLES, before_work

pytestmark = pytest.mark.usefixtures("generates_as_before")


def test_unknown_field(model, inputs, forwards):
    before_work(
        forwards, ValueError, "Unknown field 'top_k'.*Allowed: top_k_ratio", trimmed, model, inputs, {"top_k": 5}
    )
    before_work(forwards, ValueError, "Unknown field 'top_k'", TrimmedCache, model, {"top_k": 5})


@pytest.mark.parametrize("ratio", [0, 0.0, -0.5, 1.5, float("nan"), float("inf"), "0.5", True, [0.5]])
def test_ratio_not_allowed(model, inputs, forwards, ratio):
    match = r"top_k_ratio must be a number in \(0, 1\], got"
    before_work(forwards, ValueError, match, trimmed, model, inputs, {"top_k_ratio": ratio})


def test_config_type(model, inputs, forwards):
    match = "cache_config of the trimmed cache must be a dict or a TrimConfig, got list"
    before_work(forwards, TypeError, match, trimmed, model, inputs, [0.5])


def test_processors_and_ratio(model, inputs, forwards):
    config = {"processors": [TopKPerHead(0.5)], "top_k_ratio": 0.5}
    before_work(forwards, ValueError, "processors and top_k_ratio are both given", trimmed, model, inputs, config)


@pytest.mark.parametrize("processors", [[], (), TopKPerHead(0.5), "topk", [TopKPerHead], ["topk"], {}])
def test_processors_not_a_list(model, inputs, forwards, processors):
    before_work(forwards, ValueError, "processors must", trimmed, model, inputs, {"processors": processors})


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ({"rule": "KCentre", "kept_share": 0.1}, "Unknown rule 'KCentre' in processors. Shipped: TopKPerHead"),
        ({"rule": "KCenter"}, "The rule 'KCenter' cannot be made with {}"),
        ({"rule": f"{__name__}:Gone"}, "There is no rule"),
        ({"rule": "torch:nn"}, "is no rule"),
    ],
)
def test_rule_unknown(model, inputs, forwards, rule, match):
    before_work(forwards, ValueError, match, trimmed, model, inputs, {"processors": [rule]})


def test_rule_not_imported(model, inputs, forwards):
    match = "The rule 'my_rules:TwoHeadsAgree' lies in a module that is not imported.*`import my_rules` before"
    config = {"processors": [{"rule": "my_rules:TwoHeadsAgree", "minimum": 8}]}
    before_work(forwards, ValueError, match, trimmed, model, inputs, config)


def test_rule_cannot_be_saved(model, forwards, tmp_path, monkeypatch):
    settings = model.generation_config
    settings.save_pretrained(tmp_path)
    before = (tmp_path / "generation_config.json").read_bytes()
    monkeypatch.setattr(settings, "cache_config", {"processors": [lambda scores, visible: scores]})
    for saved in (settings, model):
        match = "The visual token processor <lambda> cannot be saved"
        before_work(forwards, ValueError, match, saved.save_pretrained, tmp_path)
        assert (tmp_path / "generation_config.json").read_bytes() == before


@pytest.mark.parametrize("field", ["kv_quantization", "self_kv_quantization"])
def test_field_not_allowed(model, inputs, forwards, field):
    before_work(forwards, ValueError, f"{field} must be one of .*, got 'int9'", trimmed, model, inputs, {field: "int9"})


@pytest.mark.parametrize("pictures", [0, -1, 1.5, "2", True])
def test_prefill_pictures(model, inputs, forwards, pictures):
    match = "prefill_pictures must be a positive integer, got"
    before_work(forwards, ValueError, match, trimmed, model, inputs, {"prefill_pictures": pictures})


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan"), "0.5", True])
def test_tower_share(model, inputs, forwards, share):
    match = r"tower_share must be a number in \(0, 1\], got"
    before_work(forwards, ValueError, match, trimmed, model, inputs, {"tower_share": share})


def test_static_without_length(model, forwards):
    match = "A static cache needs to know how long the text can get"
    before_work(forwards, ValueError, match, TrimmedCache, model, {"static": True})


def test_no_cross_attention(forwards):
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, pad_token_id=0, eos_token_id=None, **settings)).eval()
    inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    expected = generate(llama, inputs)
    match = "needs an Mllama model .* but LlamaForCausalLM has none"
    with pytest.raises(ValueError, match=match):
        trimmed(llama, inputs, {})
    with pytest.raises(ValueError, match=match):
        TrimmedCache(llama)
    assert torch.equal(expected.sequences, generate(llama, inputs).sequences)


def test_two_layers_at_one_place():
    model = random_model(layers=4)
    layers, inputs = model.model.language_model.layers, random_inputs(model, SAMPLES)
    for changed in ([0, 1, 2, 2, 3], [0, 1, 2, 3, 1]):
        model.model.language_model.layers = torch.nn.ModuleList([layers[index] for index in changed])
        place = max(set(changed), key=changed.count)
        first, second = (number for number, index in enumerate(changed) if index == place)
        match = f"Decoder layers {first} and {second} of this model both say layer_idx={place}"
        with pytest.raises(ValueError, match=match):
            trimmed(model, inputs, {})
        with pytest.raises(ValueError, match=match):
            TrimmedCache(model)
    model.model.language_model.layers = layers
    trimmed(model, inputs, {})


def test_both_caches(model, inputs, forwards):
    cache = TrimmedCache(model)
    match = "Passing both `cache_implementation`"
    before_work(forwards, ValueError, match, trimmed, model, inputs, {}, cache=cache)
    generate(model, inputs, cache=cache)


def test_changed_transformers(monkeypatch, model, inputs, forwards):
    """One of many; the others are planted in tests/test_contract.py."""
    match = f"cannot hook into transformers .* did not find: .*; {CACHE}= of MllamaTextModel.forward; .*Supported is"
    with monkeypatch.context() as planted:
        planted.setattr(MllamaTextModel, "forward", lambda self, input_ids=None, renamed=None, **kwargs: None)
        before_work(forwards, UnsupportedTransformersError, match, trimmed, model, inputs, {})
        before_work(forwards, UnsupportedTransformersError, match, TrimmedCache, model)
