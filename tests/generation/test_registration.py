import subprocess
import sys
import threading
import time

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import configuration_utils
from transformers.generation.utils import GenerationMixin

import trim_plugin
from trim_plugin import TrimConfig, TrimmedCache
from trim_plugin.compat import cache_of
from trim_plugin.generation import registration

from ..random_models import Sample, at_once, generate, random_inputs, trimmed

ONE = [Sample((1, (6,), 6))]


def test_importing_alone_registers():
    code = "import trim_plugin; from transformers import GenerationConfig; GenerationConfig(cache_implementation='trimmed')"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_registering_twice_and_unregistering_restores_everything():
    trim_plugin.unregister()
    method, names = GenerationMixin._prepare_cache_for_generation, configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    trim_plugin.register()
    trim_plugin.register()
    assert configuration_utils.ALL_CACHE_IMPLEMENTATIONS.count("trimmed") == 1
    trim_plugin.unregister()
    assert GenerationMixin._prepare_cache_for_generation is method
    assert names == configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    with pytest.raises(ValueError, match="Invalid `cache_implementation`"):
        GenerationConfig(cache_implementation="trimmed").validate()
    trim_plugin.unregister()


def test_every_way_to_ask_for_it(model):
    inputs = random_inputs(model, ONE)
    by_arguments = trimmed(model, inputs, {"top_k_ratio": 0.1})
    config = GenerationConfig(cache_implementation="trimmed", cache_config={"top_k_ratio": 0.1}, pad_token_id=0)
    by_config = generate(model, inputs, generation_config=config)
    by_object = trimmed(model, inputs, TrimConfig(top_k_ratio=0.1))
    model.generation_config.cache_implementation = "trimmed"
    model.generation_config.cache_config = {"top_k_ratio": 0.1}
    by_model = generate(model, inputs)
    for output in (by_config, by_object, by_model):
        assert isinstance(cache_of(output), TrimmedCache)
        assert torch.equal(output.sequences, by_arguments.sequences)
        assert torch.equal(cache_of(output).kept_indices[0], cache_of(by_arguments).kept_indices[0])


def test_the_callers_settings_are_left_alone(model):
    settings = {"top_k_ratio": 0.1}
    trimmed(model, random_inputs(model, ONE), settings)
    assert settings == {"top_k_ratio": 0.1}


def test_bad_settings_are_refused_before_any_forward(model):
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(ValueError, match="top_k_ratio must be"):
        trimmed(model, random_inputs(model, ONE), {"top_k_ratio": 3})
    assert not runs


def test_use_cache_false_is_stock(model):
    inputs = random_inputs(model, ONE)
    output = generate(model, inputs, use_cache=False, cache_implementation="trimmed")
    assert torch.equal(output.sequences, generate(model, inputs, use_cache=False).sequences)


def test_both_kinds_of_cache_at_once_is_refused(model):
    with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
        trimmed(model, random_inputs(model, ONE), None, cache=TrimmedCache(model))


def test_threads_that_register_at_once_wrap_once():
    method = "_prepare_cache_for_generation"
    trim_plugin.unregister()
    plain, names = getattr(GenerationMixin, method), configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    assert not hasattr(plain, "_trim_plugin_original")
    for _ in range(20):
        at_once(trim_plugin.register)
        assert getattr(GenerationMixin, method)._trim_plugin_original is plain
        assert configuration_utils.ALL_CACHE_IMPLEMENTATIONS.count("trimmed") == 1
        at_once(trim_plugin.unregister)
        assert getattr(GenerationMixin, method) is plain
        assert names == configuration_utils.ALL_CACHE_IMPLEMENTATIONS
        at_once(trim_plugin.register, trim_plugin.unregister)
        trim_plugin.unregister()
        assert getattr(GenerationMixin, method) is plain


def test_unregistering_waits_for_a_registration_in_another_thread(monkeypatch):
    """Otherwise what the first thread wraps after the second one has unwrapped would stay wrapped."""
    trim_plugin.unregister()
    plain, begun = GenerationMixin._prefill, threading.Event()

    def slowly(original):
        begun.set()
        time.sleep(0.2)
        return lambda *args, **kwargs: original(*args, **kwargs)

    monkeypatch.setitem(registration._WRAPPERS, "_prefill", slowly)
    first = threading.Thread(target=trim_plugin.register)
    first.start()
    assert begun.wait(timeout=30)
    trim_plugin.unregister()
    first.join()
    assert GenerationMixin._prefill is plain
    assert "trimmed" not in configuration_utils.ALL_CACHE_IMPLEMENTATIONS
