"""Planted changes of what trim_plugin hooks into: each is named by the contract's error, before anything runs."""

from __future__ import annotations

import functools
import inspect
import sys
import timeit
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, cache_utils, masking_utils, modeling_outputs
from transformers.generation import configuration_utils
from transformers.generation.utils import GenerationMixin
from transformers.models.mllama import modeling_mllama

import trim_plugin
from trim_plugin import TrimmedCache
from trim_plugin.compat import CACHE, UnsupportedTransformersError
from trim_plugin.contract import check_contract, check_generation

from .random_models import Sample, generate, random_inputs, random_model, trimmed

ROOT = Path(__file__).parents[1]
CONFIG = {"top_k_ratio": 0.2}
ONE = [Sample((1, (6,), 6))]


@pytest.fixture(scope="module")
def fresh():
    """A model that never carries hooks, and inputs."""
    model = random_model()
    return model, random_inputs(model, ONE)


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_pre_hooks, *module._forward_hooks)]


def renamed(function, argument, name="renamed"):
    """The same function, which takes an argument by another name."""
    signature = inspect.signature(function)
    assert argument in signature.parameters

    def planted(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    parameters = [one.replace(name=name) if one.name == argument else one for one in signature.parameters.values()]
    planted.__signature__ = signature.replace(parameters=parameters)
    return planted


def refused(model, inputs, match):
    """Neither a cache of one's own nor `generate` begins, the message names all, and no hook is left behind."""
    ran = []
    handle = model.model.register_forward_pre_hook(lambda *_: ran.append(1))
    for call in (lambda: TrimmedCache(model), lambda: trimmed(model, inputs, {"top_k_ratio": 0.2})):
        with pytest.raises(UnsupportedTransformersError, match=match) as caught:
            call()
        assert isinstance(caught.value, ImportError)
        assert all(word in str(caught.value) for word in ("5.17 to 5.24", trim_plugin.compat.OLDEST, "did not find"))
    handle.remove()
    assert not ran
    assert hooks_of(model) == []


@pytest.mark.parametrize(
    ("owner", "argument"),
    [
        ("MllamaCrossAttentionDecoderLayer", CACHE),
        ("MllamaCrossAttentionDecoderLayer", "cross_attention_states"),
        ("MllamaCrossAttentionDecoderLayer", "full_text_row_masked_out_mask"),
        ("MllamaTextCrossAttention", CACHE),
        ("MllamaTextModel", CACHE),
        ("MllamaTextModel", "cross_attention_mask"),
        ("MllamaModel", CACHE),
        ("MllamaModel", "pixel_values"),
        ("MllamaVisionModel", "aspect_ratio_mask"),
        ("MllamaVisionEncoder", "attention_mask"),
    ],
)
def test_a_renamed_argument_of_a_forward(monkeypatch, fresh, owner, argument):
    model, inputs = fresh
    expected = generate(model, inputs).sequences
    found = getattr(modeling_mllama, owner)
    monkeypatch.setattr(found, "forward", renamed(found.forward, argument))
    refused(model, inputs, f"did not find: {argument}= of {owner}.forward")
    assert torch.equal(generate(model, inputs).sequences, expected), "stock goes on"


PREPARE = "_prepare_cache_for_generation"
#: Whose name is gone, or has an argument renamed, and what the error says.
PLANTED = [
    (GenerationMixin, "_prefill", None, "did not find: GenerationMixin._prefill"),
    (GenerationMixin, "_get_candidate_generator", None, "did not find: GenerationMixin._get_candidate_generator"),
    (cache_utils, "StaticLayer", None, "StaticLayer"),
    (cache_utils.Cache, "get_mask_sizes", None, "Cache.get_mask_sizes"),
    (cache_utils.DynamicLayer, "crop", None, "DynamicLayer.crop"),
    (GenerationMixin, PREPARE, "batch_size", rf"{PREPARE}\(generation_config, model_kwargs, "),
    (GenerationMixin, "_prefill", "generation_config", r"_prefill\(input_ids, generation_config, model_kwargs, ...\)"),
    (GenerationMixin, "_get_candidate_generator", "model_kwargs", "model_kwargs= of GenerationMixin._get_candidate"),
    (GenerationConfig, "to_json_string", "ignore_metadata", r"to_json_string\(use_diff, ignore_metadata, ...\)"),
    (masking_utils, "create_causal_mask", "allow_is_causal_skip", "allow_is_causal_skip= of .*create_causal_mask"),
]


@pytest.mark.parametrize(("owner", "name", "argument", "message"), PLANTED)
def test_a_removed_name_and_a_renamed_argument(monkeypatch, fresh, owner, name, argument, message):
    if argument is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, renamed(getattr(owner, name), argument))
    refused(*fresh, message)


def test_all_that_is_missing_is_named_at_once(monkeypatch, fresh):
    monkeypatch.delattr(GenerationMixin, "_prefill")
    layer = modeling_mllama.MllamaCrossAttentionDecoderLayer
    monkeypatch.setattr(layer, "forward", renamed(layer.forward, CACHE))
    refused(*fresh, f"GenerationMixin._prefill; {CACHE}= of MllamaCrossAttentionDecoderLayer.forward")


def test_a_part_of_the_layers_is_gone(fresh):
    model, _ = fresh
    attention = model.model.language_model.layers[1].cross_attn
    heads = attention.__dict__.pop("num_heads")
    with pytest.raises(UnsupportedTransformersError, match=r"did not find: MllamaTextCrossAttention.num_heads\."):
        TrimmedCache(model)
    attention.num_heads = heads
    assert hooks_of(model) == []


def test_a_module_with_a_forward_of_its_own(model):
    layer, text = model.model.language_model.layers[3], model.model.language_model

    class Other(type(text)):
        def forward(self, input_ids=None, renamed=None, **kwargs):
            return super().forward(input_ids, **{CACHE: renamed}, **kwargs)

    layer.forward = lambda hidden_states, renamed=None, **kwargs: hidden_states
    with pytest.raises(UnsupportedTransformersError, match=f"; {CACHE}= of MllamaCrossAttentionDecoderLayer.forward; "):
        TrimmedCache(model)
    del layer.forward
    text.__class__ = Other
    with pytest.raises(UnsupportedTransformersError, match=f"; {CACHE}= of Other.forward; "):
        TrimmedCache(model)
    assert hooks_of(model) == []
    text.__class__ = Other.__base__
    layer.forward = functools.partial(type(layer).forward, layer)  # as wrappers do
    TrimmedCache(model)


def test_an_output_that_calls_the_cache_otherwise(monkeypatch, fresh):
    fields = dict(modeling_outputs.CausalLMOutputWithPast.__dataclass_fields__)
    fields["renamed"] = fields.pop(CACHE)
    monkeypatch.setattr(modeling_outputs.CausalLMOutputWithPast, "__dataclass_fields__", fields)
    refused(*fresh, f"CausalLMOutputWithPast.{CACHE} in")


def test_what_wraps_a_forward_without_changing_it_is_accepted(monkeypatch, model):
    layer, text = modeling_mllama.MllamaCrossAttentionDecoderLayer, modeling_mllama.MllamaTextModel
    inner, whole = layer.forward, text.forward

    @functools.wraps(inner)
    def decorated(*args, **kwargs):
        return inner(*args, **kwargs)

    def anything(*args, **kwargs):
        return whole(*args, **kwargs)

    inputs = random_inputs(model, ONE)
    expected = trimmed(model, inputs, {"top_k_ratio": 0.2}).sequences
    monkeypatch.setattr(layer, "forward", decorated)
    monkeypatch.setattr(text, "forward", anything)
    assert torch.equal(trimmed(model, inputs, {"top_k_ratio": 0.2}).sequences, expected)


def test_a_model_that_carries_hooks_already_is_checked_again(monkeypatch, model):
    inputs = random_inputs(model, ONE)
    trimmed(model, inputs, CONFIG, 2)
    monkeypatch.delattr(GenerationMixin, "_prefill")
    with pytest.raises(UnsupportedTransformersError, match=r"did not find: GenerationMixin\._prefill\."):
        TrimmedCache(model)
    with pytest.raises(UnsupportedTransformersError, match=r"did not find: GenerationMixin\._prefill\."):
        trimmed(model, inputs, CONFIG, 2)


def test_a_cache_that_was_not_made_is_no_silent_stock_generation(monkeypatch, fresh):
    model, inputs = fresh
    unwrapped = inspect.unwrap(GenerationMixin._prepare_cache_for_generation)
    monkeypatch.setattr(GenerationMixin, "_prepare_cache_for_generation", unwrapped)
    with pytest.raises(UnsupportedTransformersError, match="_prepare_cache_for_generation on Mllama"):
        trimmed(model, inputs, {})


def test_registering_is_refused_and_touches_nothing(monkeypatch):
    trim_plugin.unregister()
    names, prepare = configuration_utils.ALL_CACHE_IMPLEMENTATIONS, GenerationMixin._prepare_cache_for_generation
    with monkeypatch.context() as planted:
        planted.delattr(GenerationMixin, "_prefill")
        for _ in range(2):
            with pytest.raises(UnsupportedTransformersError, match=r"GenerationMixin\._prefill"):
                trim_plugin.register()
        assert names == configuration_utils.ALL_CACHE_IMPLEMENTATIONS
        assert GenerationMixin._prepare_cache_for_generation is prepare
    trim_plugin.register()
    assert "trimmed" in configuration_utils.ALL_CACHE_IMPLEMENTATIONS


def test_checking_again_costs_next_to_nothing():
    check_contract()
    assert min(timeit.repeat(check_contract, number=20, repeat=5)) / 20 < 2e-3


def test_public_names_that_cannot_be_imported_say_so(monkeypatch):
    for name in ("trim_plugin.forward.hooks", "trim_plugin.cache.held"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delitem(vars(trim_plugin), "TrimmedCache", raising=False)
    monkeypatch.delattr(cache_utils, "StaticLayer")
    with pytest.raises(UnsupportedTransformersError, match=r"did not find: StaticLayer in transformers\.cache_utils"):
        _ = trim_plugin.TrimmedCache


def test_the_installed_version_holds_the_contract():
    check_generation()
    check_contract()


def test_something_else_in_the_place_of_a_forward_is_not_compared(monkeypatch):
    monkeypatch.setattr(modeling_mllama.MllamaVisionModel, "forward", None)
    check_contract()
