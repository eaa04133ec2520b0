"""The rows of docs/errors.md about caches."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import trim_plugin
from trim_plugin import TopKPerHead, TrimmedCache
from trim_plugin.compat import CACHE, cache_of, slices_mask_rows

from ..exactness.conversations import Conversation
from ..random_models import Sample, generate, random_inputs, random_model, trimmed
from .checks import SAMPLES, before_work

pytestmark = pytest.mark.usefixtures("generates_as_before")


def test_cache_of_another_model(model, inputs, forwards):
    for other in (random_model(seed=1), copy.deepcopy(model)):
        cache = TrimmedCache(other)
        forwards.clear()
        match = "made for another model"
        before_work(forwards, ValueError, match, generate, model, inputs, cache=cache)
        assert cache_of(generate(other, inputs, cache=cache)) is cache
        with pytest.raises(ValueError, match=match), torch.no_grad():
            model(**inputs, **{CACHE: TrimmedCache(other)}, use_cache=True)


def test_cache_of_another_batch(model, inputs, forwards):
    conversation = Conversation(model)
    cache = TrimmedCache(model)
    conversation.hear(generate(model, conversation.say(Sample(((6,), 4))).inputs(), cache=cache).sequences)
    follow_up = conversation.say(Sample((3,))).inputs(earlier_pictures=1)
    past = cache.get_seq_length()
    two = {name: tensor.repeat_interleave(2, dim=0) for name, tensor in follow_up.items()}
    for given, settings in ((two, {}), (follow_up, {"num_beams": 2}), (follow_up, {"num_return_sequences": 2})):
        forwards.clear()
        settings = {CACHE: cache, "do_sample": "num_return_sequences" in settings, **settings}
        match = "holds 1 samples, but this generation has 2 "
        before_work(forwards, ValueError, match, generate, model, given, **settings)
    assert cache.get_seq_length() == past
    generate(model, follow_up, cache=cache)


def test_one_cache_to_fill(model, inputs, forwards):
    cache = TrimmedCache(model)
    before_work(forwards, TypeError, "needs one TrimmedCache, got 0", trim_plugin.prefill, model, **inputs)
    two = {"cache": cache, "past_key_values": TrimmedCache(model)}
    before_work(forwards, TypeError, "needs one TrimmedCache, got 2", trim_plugin.prefill, model, **two, **inputs)
    assert cache_of(trim_plugin.prefill(model, past_key_values=cache, **inputs)) is cache


def test_cache_by_another_name(model, inputs, forwards):
    cache = TrimmedCache(model)
    forwards.clear()
    if CACHE == "cache":  # the whole model takes both names, and takes its own from two
        call, wrong = model.model, {"cache": None, "past_key_values": cache}
    else:
        call, wrong = model, {"cache": cache}
    match = f"given as {list(wrong)[-1]}=, which transformers .* ignores. Give it as {CACHE}="
    before_work(forwards, TypeError, match, call, **inputs, **wrong, use_cache=True)


def test_cache_too_short(model, inputs, forwards):
    prompt = inputs["input_ids"].shape[1]
    cache = TrimmedCache(model, {"static": True, "max_cache_len": prompt + 2})
    forwards.clear()
    match = f"has room for {prompt + 2} text tokens, but this generation can reach {prompt + 3}, "
    settings = {CACHE: cache, "disable_compile": True}
    before_work(forwards, ValueError, match, generate, model, inputs, 4, **settings)
    assert cache.get_seq_length() == 0
    # What is generated last is not read any more, so one token more than there is room for can be.
    assert cache_of(generate(model, inputs, 3, **settings)).get_seq_length() == prompt + 2


def test_cache_after_detach(model, inputs, forwards):
    cache = TrimmedCache(model)
    trim_plugin.detach(model)
    match = "hooks were removed"
    before_work(forwards, ValueError, match, generate, model, inputs, cache=cache)


def test_forward_without_hooks(model, inputs):
    cache = TrimmedCache(model)
    trim_plugin.detach(model)
    with pytest.raises(RuntimeError, match="reached a model that has no trim_plugin hooks"), torch.no_grad():
        model(**inputs, **{CACHE: cache}, use_cache=True)


def test_cache_from_a_file(model, inputs):
    cache = pickle.loads(pickle.dumps(TrimmedCache(model)))  # noqa: S301
    trim_plugin.detach(model)
    match = r"read from a file or came from another process, .* Call cache.bind\(model\)"
    with pytest.raises(RuntimeError, match=match), torch.no_grad():
        model(**inputs, **{CACHE: cache}, use_cache=True)
    cache.bind(model)
    generate(model, inputs, cache=cache)


def test_cache_left_over(model, inputs, forwards):
    fail = [True]

    def moody(scores, visible):
        if fail[0]:
            raise ArithmeticError
        return scores

    cache = TrimmedCache(model, {"processors": [moody, TopKPerHead(0.3)]})
    with pytest.raises(ArithmeticError):
        generate(model, inputs, cache=cache)
    forwards.clear()
    match = "left over from a forward that failed"
    before_work(forwards, ValueError, match, generate, model, inputs, cache=cache)
    if slices_mask_rows():  # before that, transformers itself fails on rows that the mask does not have
        with pytest.raises(ValueError, match=match), torch.no_grad():
            model(**inputs, **{CACHE: cache}, use_cache=True)
    fail[0] = False
    cache.reset()
    ours = generate(model, inputs, cache=cache)
    assert torch.equal(trimmed(model, inputs, {"top_k_ratio": 0.3}).sequences, ours.sequences)


@pytest.mark.parametrize("helper", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_continuation(model, forwards, helper):
    conversation = Conversation(model)
    cache = TrimmedCache(model)
    conversation.hear(generate(model, conversation.say(Sample(((6,), 4))).inputs(), cache=cache).sequences)
    follow_up = conversation.say(Sample((3,))).inputs(earlier_pictures=1)
    forwards.clear()
    settings = {CACHE: cache, helper: 3 if helper == "prompt_lookup_num_tokens" else model}
    before_work(forwards, NotImplementedError, "cannot continue a cache", generate, model, follow_up, **settings)
    generate(model, follow_up, cache=cache)


def test_assisted_on_a_static_cache(model, forwards):
    inputs = random_inputs(model, SAMPLES[:1])
    match = "takes rejected tokens back, which a static TrimmedCache does not"
    config = {"static": True}
    before_work(forwards, NotImplementedError, match, trimmed, model, inputs, config, prompt_lookup_num_tokens=3)


def test_assisted_on_old_transformers(model, forwards, monkeypatch):
    from trim_plugin.generation import assisted

    monkeypatch.setattr(assisted, "slices_mask_rows", lambda: False)
    inputs = random_inputs(model, SAMPLES[:1])
    match = "cannot do assisted decoding .* with pictures on Mllama"
    before_work(forwards, NotImplementedError, match, trimmed, model, inputs, {}, prompt_lookup_num_tokens=3)
