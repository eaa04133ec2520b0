"""Settings in a model's generation configuration: saved, printed, compared, and as before when they come back."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import GenerationConfig, MllamaForConditionalGeneration

import trim_plugin
from trim_plugin import KCenter, TopKPerHead, TopPPerHead, TrimConfig
from trim_plugin.compat import cache_of

from ..random_models import Sample, generate, random_inputs

SHARES = st.floats(0, 1, exclude_min=True)
RULES = st.one_of(
    st.builds(TopKPerHead, SHARES),
    st.builds(TopPPerHead, SHARES),
    st.builds(KCenter, SHARES),
    st.builds(lambda radius: KCenter(radius=radius), SHARES),
    st.just(torch.nn.functional.relu),  # a function of an importable name
)


@st.composite
def settings(draw):
    """Fields of a `TrimConfig`, as a user gives them."""
    fields = draw(
        st.sampled_from([{}, {"top_k_ratio": draw(SHARES)}, {"processors": draw(st.lists(RULES, min_size=1))}])
    )
    fields = dict(fields, static=draw(st.booleans()), merge=draw(st.booleans()))
    optional = {
        "kv_quantization": st.sampled_from(["int8", "nf4"]),
        "static_bucket": st.integers(1, 1000),
        "max_cache_len": st.integers(1, 10**6),
        "prefill_pictures": st.integers(1, 10**6),
        "tower_share": SHARES,
    }
    if not fields["static"]:
        optional["self_kv_quantization"] = st.sampled_from(["fp8", "quanto"])
    for name, values in optional.items():
        if draw(st.booleans()):
            fields[name] = draw(values)
    return fields


def reloaded(config: GenerationConfig) -> GenerationConfig:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return GenerationConfig.from_pretrained(folder)


def test_every_field_is_drawn():
    every = {field.name for field in dataclasses.fields(TrimConfig)}
    assert every == {
        *("top_k_ratio", "processors", "kv_quantization", "self_kv_quantization", "static", "static_bucket"),
        *("max_cache_len", "merge", "prefill_pictures", "tower_share"),
    }, "draw the new field in `settings` too"


@given(settings(), st.booleans())
@example({"top_k_ratio": 1.0}, True)
@example({"processors": [KCenter(0.1)]}, False)
def test_settings_come_back_equal(fields, as_object):
    given_settings = TrimConfig(**fields) if as_object else fields
    before = dict(fields)
    config = GenerationConfig(cache_implementation="trimmed", cache_config=given_settings)
    again = reloaded(config)
    assert TrimConfig.of(again.cache_config) == TrimConfig(**fields)
    assert config.cache_config is given_settings, "saving changes nothing"
    assert fields == before
    assert again == config
    assert hash(again) == hash(config)
    # Saved once more, it says the same.
    assert reloaded(again).to_json_string() == again.to_json_string()
    written = json.loads(config.to_json_string())["cache_config"]
    assert repr(config) == str(config)
    assert all(f'"{name}"' in repr(config) for name in written)
    # In Python it holds what was given.
    assert TrimConfig.of(copy.deepcopy(config).cache_config) == TrimConfig(**fields)
    assert TrimConfig.of(config.to_diff_dict()["cache_config"]) == TrimConfig(**fields)
    assert TrimConfig.of(json.loads(json.dumps(TrimConfig(**fields).to_dict()))) == TrimConfig(**fields)


@pytest.mark.parametrize(
    "given_settings",
    [
        TrimConfig(top_k_ratio=1.0),
        {"processors": [KCenter(0.2)], "merge": False},
        TrimConfig(processors=[TopPPerHead(0.5)]),
    ],
    ids=repr,
)
def test_a_saved_model_trims_as_before(model, tmp_path, given_settings):
    inputs = random_inputs(model, [Sample((2, (6,), 5))])
    model.generation_config.cache_implementation = "trimmed"
    model.generation_config.cache_config = given_settings
    model.generation_config.return_dict_in_generate = True
    model.save_pretrained(tmp_path)
    again = MllamaForConditionalGeneration.from_pretrained(tmp_path).eval()
    ours, theirs = (generate(one, inputs, return_dict_in_generate=True) for one in (model, again))
    assert torch.equal(ours.sequences, theirs.sequences)
    kept, kept_again = (cache_of(output).kept_indices[0] for output in (ours, theirs))
    assert torch.equal(kept, kept_again)
    assert cache_of(theirs).config == TrimConfig.of(given_settings)


@pytest.mark.parametrize("as_object", [True, False])
def test_a_rule_that_cannot_be_saved_is_shown_and_leaves_the_file_as_it_was(tmp_path, as_object):
    GenerationConfig(cache_config={"top_k_ratio": 0.5}).save_pretrained(tmp_path)
    fields = {"processors": [lambda scores, visible: scores]}
    config = GenerationConfig(cache_config=TrimConfig(**fields) if as_object else fields)
    assert "<lambda>" in repr(config)
    assert (
        config == copy.copy(config) != GenerationConfig(cache_config={"processors": [lambda scores, visible: scores]})
    )
    assert isinstance(hash(config), int)
    for save in (config.to_json_string, lambda: config.save_pretrained(tmp_path)):
        with pytest.raises(
            ValueError, match="The visual token processor <lambda> cannot be saved: no program could find it"
        ):
            save()
    assert GenerationConfig.from_pretrained(tmp_path).cache_config == {"top_k_ratio": 0.5}


def test_other_configurations_are_written_as_they_were(tmp_path):
    settings = {"backend": "quanto", "nbits": 4}
    config = GenerationConfig(cache_implementation="quantized", cache_config=settings, temperature=0.5, do_sample=True)
    ours = (
        config.to_json_string(),
        config.to_json_string(False),
        config.to_json_string(use_diff=True, ignore_metadata=True),
    )
    trim_plugin.unregister()
    theirs = (
        config.to_json_string(),
        config.to_json_string(False),
        config.to_json_string(use_diff=True, ignore_metadata=True),
    )
    assert ours == theirs


def test_a_config_object_is_saved_without_the_registration_too():
    trim_plugin.unregister()
    assert not hasattr(GenerationConfig.to_json_string, "_trim_plugin_original")
    assert not hasattr(GenerationConfig.to_json_file, "_trim_plugin_original")
    config = GenerationConfig(cache_config=TrimConfig(processors=[KCenter(radius=0.2)], static=True))
    assert TrimConfig.of(reloaded(config).cache_config) == config.cache_config
