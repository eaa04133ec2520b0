"""What is read of a model's config.json, against transformers' own reading."""

import dataclasses
import json

import pytest
from transformers import AutoConfig, MllamaConfig

from trim_plugin.planning import configuration

from ..random_models import random_config


def numbers_of(config):
    """The same fields of transformers' configuration."""
    return {
        part: {
            field.name: getattr(getattr(config, part), field.name)
            for field in dataclasses.fields(getattr(configuration.ModelNumbers(), part))
        }
        for part in ("vision_config", "text_config")
    }


@pytest.mark.parametrize("config", [MllamaConfig(), random_config(), random_config(heads=8, kv_heads=2, image_size=16)])
@pytest.mark.parametrize("whole", [True, False])
def test_a_folders_json_is_read_as_transformers_reads_it(config, whole, tmp_path):
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=not whole))
    found = configuration.read_config(json.loads((tmp_path / "config.json").read_text()))
    assert dataclasses.asdict(found) == numbers_of(AutoConfig.from_pretrained(tmp_path)) == numbers_of(config)


def test_what_is_left_out_or_null_is_as_in_transformers():
    given = {"model_type": "mllama", "text_config": None, "vision_config": {"hidden_size": None}}
    assert configuration.read_config(given) == configuration.ModelNumbers()
    assert dataclasses.asdict(configuration.ModelNumbers()) == numbers_of(MllamaConfig())


def mllama(**parts):
    return {"model_type": "mllama", **parts}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "qwen2_vl"}, "a qwen2_vl model; trim-plugin needs an Mllama"),
        ({}, "no model's configuration: it names no 'model_type'"),
        ([1], "no model's configuration"),
        ({"model_type": 7}, "no model's configuration"),
        (mllama(text_config="x"), "'text_config' must be an object, got 'x'"),
        (mllama(text_config={"hidden_size": "wide"}), "text_config.hidden_size must be a positive integer, got 'wide'"),
        (mllama(vision_config={"patch_size": 0}), "vision_config.patch_size must be a positive"),
        (mllama(vision_config={"image_size": True}), "vision_config.image_size must be a positive"),
        (mllama(text_config={"cross_attention_layers": []}), "cross_attention_layers must be a list of layers"),
        (mllama(text_config={"cross_attention_layers": [1.5]}), "cross_attention_layers must be a list of layers"),
        (mllama(vision_config={"supported_aspect_ratios": 8}), "supported_aspect_ratios must be a list of shapes"),
    ],
)
def test_what_is_no_mllama_configuration_is_said(settings, message):
    with pytest.raises(ValueError, match=message):
        configuration.read_config(settings)
