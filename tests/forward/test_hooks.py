import copy
import pickle
import time

import pytest
import torch
from transformers import DynamicCache

import trim_plugin
from trim_plugin import TrimmedCache
from trim_plugin.cache.reading import NamingOurs, install
from trim_plugin.compat import CACHE, UnsupportedTransformersError
from trim_plugin.forward.finding import cross_layers, find_text_model, has_cross_attention
from trim_plugin.forward.hooks import after_layer, attach, before_layer
from trim_plugin.forward.tower_merging import attach_to_tower
from trim_plugin.generation.checks import has_hooks

from ..random_models import PAIR, at_once, prefilled


def hooks_of(model):
    layers = model.model.language_model.layers
    return [hook for layer in layers for hook in (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values())]


def test_hooks_are_attached_once_and_detached_wholly(model):
    own = lambda *_: None  # noqa: E731
    model.model.language_model.layers[1].register_forward_pre_hook(own)
    attach(model)
    attach(model)
    assert hooks_of(model) == [own, before_layer, after_layer, before_layer, after_layer]
    trim_plugin.detach(model)
    assert hooks_of(model) == [own]
    assert not any(layer._forward_hooks_with_kwargs for layer in model.model.language_model.layers)
    trim_plugin.detach(model)


def test_hooks_do_nothing_for_any_other_cache(model):
    text_model = attach(model)
    layer = text_model.layers[1]
    for cache in (None, DynamicCache(config=text_model.config)):
        kwargs = {CACHE: cache, "cross_attention_states": object(), "cross_attention_mask": object()}
        assert before_layer(layer, (torch.zeros(1, 2, 32),), kwargs) is None
        assert after_layer(layer, (torch.zeros(1, 2, 32),), kwargs, None) is None


def test_a_decoding_row_gets_no_mask_since_what_is_read_brings_its_own(model):
    _, cache = prefilled(model, PAIR)
    seen = []
    for index in cache.cross_layers:
        model.model.language_model.layers[index].register_forward_pre_hook(
            lambda _layer, _args, kwargs: seen.append(kwargs["cross_attention_mask"]), with_kwargs=True
        )
    with torch.no_grad():
        model(input_ids=torch.tensor([[5], [6]]), **{CACHE: cache}, use_cache=True)
    assert seen == [None] * 2
    assert cache.turn is None


def test_the_text_model_is_found_in_wrappers_and_missed_where_there_is_none(model):
    wrapper = torch.nn.ModuleDict({"inner": torch.nn.Sequential(model)})
    assert find_text_model(wrapper) is model.model.language_model
    assert has_cross_attention(wrapper)
    assert not has_cross_attention(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Linear has none"):
        find_text_model(torch.nn.Linear(2, 2))


def test_hooks_of_a_copy_are_its_own(model):
    text_model = attach(model)
    copied = copy.deepcopy(model)
    assert has_hooks(copied.model.language_model)
    trim_plugin.detach(copied)
    assert not has_hooks(copied.model.language_model)
    assert has_hooks(text_model)
    assert hooks_of(copied) == []


def test_one_layer_without_hooks_is_not_attached(model):
    text_model = attach(model)
    text_model.layers[3]._forward_pre_hooks.clear()
    assert not has_hooks(text_model)


def test_a_failed_forward_marks_the_cache(model):
    inputs, cache = prefilled(model, PAIR)

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.model.language_model.layers[3].register_forward_pre_hook(fail)
    cache.reset()
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(**inputs, **{CACHE: cache}, use_cache=True)
    handle.remove()
    assert cache.turn.begun
    with pytest.raises(ValueError, match="left over from a forward that failed"), torch.no_grad():
        model(input_ids=torch.tensor([[5], [6]]), **{CACHE: cache}, use_cache=True)
    cache.reset()
    with torch.no_grad():
        model(**inputs, **{CACHE: cache}, use_cache=True)
    assert cache.turn is None


@pytest.mark.parametrize("rows", [1, 2])
def test_a_cache_that_does_not_fit_is_as_it_was(model, rows):
    """It is looked at before any layer runs, so that the text is not in some layers and missing in others."""
    _, cache = prefilled(model, PAIR)
    _, unhindered = prefilled(model, PAIR)
    other, text = copy.deepcopy(model), torch.tensor([[5] * rows, [6] * rows])
    with torch.no_grad():
        with pytest.raises(ValueError, match="made for another model"):
            other(input_ids=text, **{CACHE: cache}, use_cache=True)
        with pytest.raises(ValueError, match="holds 2 samples, but the forward has 3"):
            model(input_ids=torch.tensor([[5] * rows] * 3), **{CACHE: cache}, use_cache=True)
        step = {"input_ids": torch.tensor([[5], [6]]), "use_cache": True}
        expected = model(**step, **{CACHE: unhindered}).logits
        assert torch.equal(model(**step, **{CACHE: cache}).logits, expected)


def test_a_copy_of_a_model_decodes_from_a_cache_that_was_read_from_a_file(model):
    _, cache = prefilled(model, PAIR)
    copied, step = copy.deepcopy(model), {"input_ids": torch.tensor([[5], [6]]), "use_cache": True}
    with torch.no_grad():
        again = pickle.loads(pickle.dumps(cache))  # noqa: S301
        again.bind(copied)
        expected = model(**step, **{CACHE: cache}).logits
        assert torch.allclose(copied(**step, **{CACHE: again}).logits, expected, atol=1e-5)


def test_a_layer_that_gets_the_cache_by_another_name_is_no_layer_without_one(model):
    """A signature cannot tell how the text model calls its layers; the first call does."""
    cache = TrimmedCache(model)
    layer = model.model.language_model.layers[1]
    for args, kwargs in (((cache,), {}), ((), {"renamed": cache})):
        with pytest.raises(UnsupportedTransformersError, match=f"a call of MllamaCrossAttention.* with {CACHE}="):
            before_layer(layer, (torch.zeros(1, 2, 32), *args), kwargs)


def test_threads_that_attach_at_once_put_on_one_set_of_hooks(model, monkeypatch):
    tower, register = model.model.vision_model, torch.nn.Module.register_forward_pre_hook

    def slowly(*args, **kwargs):
        time.sleep(0.01)  # others look meanwhile, and find no hook
        return register(*args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "register_forward_pre_hook", slowly)
    at_once(lambda: attach(model), lambda: attach_to_tower(tower), lambda: TrimmedCache(model))
    found = [hook for module in model.modules() for hook in all_hooks(module)]
    assert found
    assert all(len(set(map(id, hooks))) == len(hooks) for hooks in map(all_hooks, model.modules()))
    assert not any(
        isinstance(layer.cross_attn.config.real, NamingOurs) for layer in cross_layers(find_text_model(model))
    )
    at_once(lambda: trim_plugin.detach(model))
    assert not any(map(all_hooks, model.modules()))
    assert not any(isinstance(layer.cross_attn.config, NamingOurs) for layer in cross_layers(find_text_model(model)))


def test_threads_that_install_at_once_put_on_one_configuration(model):
    attention = model.model.language_model.layers[1].cross_attn
    plain = attention.config
    for _ in range(20):
        at_once(lambda: install(attention))
        assert attention.config.real is plain
        attention.config = plain


def all_hooks(module):
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
