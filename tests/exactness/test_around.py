"""What surrounds a model: dtypes, autocast, copies, saving, threads, garbage collection."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref

import pytest
import torch
from transformers import MllamaForConditionalGeneration

import trim_plugin
from trim_plugin import TrimmedCache
from trim_plugin.compat import cache_of
from trim_plugin.forward.finding import find_text_model
from trim_plugin.forward.hooks import after_layer, before_layer

from ..random_models import (
    Sample,
    check_same_up_to_ties,
    generate,
    largest_logit,
    random_inputs,
    random_model,
    trimmed,
)
from ..reference_rule import check_kept

EXACT = {"top_k_ratio": 1.0}
SAMPLES = [Sample((2, (6,), 5)), Sample((1, (2,), 3, (1, 3), 4))]


def hooks_of(model):
    return [
        hook
        for layer in find_text_model(model).layers
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks)
        for hook in hooks.values()
    ]


@pytest.fixture
def inputs(model):
    return random_inputs(model, SAMPLES)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes(model, inputs, mode):
    with mode():
        ours = trimmed(model, inputs, EXACT)
        follow_up = cache_of(trimmed(model, inputs, {"top_k_ratio": 0.2})).kept_indices
    assert torch.equal(generate(model, inputs).sequences, ours.sequences)
    expected = cache_of(trimmed(model, inputs, {"top_k_ratio": 0.2})).kept_indices
    assert all(torch.equal(a, b) for a, b in zip(follow_up, expected, strict=True))


def test_autocast_bfloat16(model, inputs):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock, ours = generate(model, inputs), trimmed(model, inputs, EXACT)
        lossy = trimmed(model, inputs, {"top_k_ratio": 0.2})
    # A few ulps of logits in bfloat16: other kernels, other order.
    check_same_up_to_ties(ours, stock, 2**-6 * largest_logit(stock))
    check_kept(cache_of(lossy).kept_indices, model, inputs, 0.2, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_changing_dtype_after_attaching(model, inputs, dtype):
    trimmed(model, inputs, {})
    model.to(dtype)
    cast = dict(inputs, pixel_values=inputs["pixel_values"].to(dtype))
    stock, ours = generate(model, cast), trimmed(model, cast, EXACT)
    check_same_up_to_ties(ours, stock, 4 * torch.finfo(dtype).eps * largest_logit(stock))
    check_kept(cache_of(trimmed(model, cast, {"top_k_ratio": 0.2}, 2)).kept_indices, model, cast, 0.2)
    cache = cache_of(trimmed(model, cast, {"top_k_ratio": 0.2}))
    assert cache.layers[1].keys.dtype == dtype
    assert 0 < cache.report().cross_kv_ratio < 1


def test_deep_copied_model(model, inputs):
    expected = trimmed(model, inputs, {"top_k_ratio": 0.2})
    twin = copy.deepcopy(model)
    ours = trimmed(twin, inputs, {"top_k_ratio": 0.2})
    assert torch.equal(expected.sequences, ours.sequences)
    assert len(hooks_of(twin)) == len(hooks_of(model)) == 4, "copied hooks are found, not put on twice"
    with pytest.raises(ValueError, match="made for another model"):
        generate(twin, inputs, cache=TrimmedCache(model, {}))
    trim_plugin.detach(twin)
    assert hooks_of(twin) == []
    assert len(hooks_of(model)) == 4


def test_detach_and_attach_again(model, inputs):
    before = trimmed(model, inputs, {"top_k_ratio": 0.2})
    trim_plugin.detach(model)
    trim_plugin.detach(model)
    assert hooks_of(model) == []
    stock = generate(model, inputs)
    assert torch.equal(before.sequences, trimmed(model, inputs, {"top_k_ratio": 0.2}).sequences)
    assert set(hooks_of(model)) == {before_layer, after_layer}
    assert torch.equal(stock.sequences, generate(model, inputs).sequences)


def test_save_and_load_a_model_with_hooks(model, inputs, tmp_path):
    expected = trimmed(model, inputs, {"top_k_ratio": 0.2})
    model.save_pretrained(tmp_path)
    loaded = MllamaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert hooks_of(loaded) == []
    settings = {"eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(expected.sequences, trimmed(loaded, inputs, {"top_k_ratio": 0.2}, **settings).sequences)


def test_saved_generation_config_names_the_cache(model, inputs, tmp_path):
    model.generation_config.cache_implementation = "trimmed"
    model.generation_config.cache_config = {"top_k_ratio": 0.2}
    ours = generate(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = MllamaForConditionalGeneration.from_pretrained(tmp_path).eval()
    again = generate(loaded, inputs, pad_token_id=0)
    assert isinstance(cache_of(again), TrimmedCache)
    assert cache_of(again).config.top_k_ratio == 0.2
    assert torch.equal(ours.sequences, again.sequences)


def test_two_models_of_one_class(inputs):
    models = [random_model(seed=1), random_model(seed=2, layers=6, cross_layers=(1, 2, 4))]
    expected = [trimmed(model, inputs, {"top_k_ratio": 0.2}).sequences for model in models]
    for _ in range(2):
        for model, sequences in zip(models, expected, strict=True):
            assert torch.equal(sequences, trimmed(model, inputs, {"top_k_ratio": 0.2}).sequences)


def test_threads_with_different_configurations(model, inputs):
    """Generations that run at the same time on one model: all their state is in their caches."""
    other = random_inputs(model, [Sample((1, (3,), 9))], seed=8)
    jobs = [
        (given, config)
        for given in (inputs, other)
        for config in (None, EXACT, {"top_k_ratio": 0.1}, {"top_k_ratio": 0.5})
    ]

    def run(given, config):
        return generate(model, given, 12) if config is None else trimmed(model, given, config, 12)

    expected = [run(*job) for job in jobs]
    results = {}

    def work(index):
        for repeat in range(3):
            results[index, repeat] = run(*jobs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(results) == 3 * len(jobs)
    for (index, _), output in results.items():
        assert torch.equal(expected[index].sequences, output.sequences)
        if jobs[index][1] is not None:
            kept = zip(cache_of(expected[index]).kept_indices, cache_of(output).kept_indices, strict=True)
            assert all(torch.equal(a, b) for a, b in kept)


def test_threads_that_attach_at_once_put_the_hooks_on_once(model):
    barrier, interval = threading.Barrier(4), sys.getswitchinterval()

    def make():
        barrier.wait(60)
        TrimmedCache(model)

    sys.setswitchinterval(1e-6)
    try:
        for _ in range(60):
            threads = [threading.Thread(target=make) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert hooks_of(model) == [before_layer, after_layer] * 2
            trim_plugin.detach(model)
    finally:
        sys.setswitchinterval(interval)


def test_nothing_keeps_a_dropped_cache_or_model_alive():
    model = random_model()
    inputs = random_inputs(model, SAMPLES)
    output = trimmed(model, inputs, {"top_k_ratio": 0.2})
    cache = weakref.ref(cache_of(output))
    keys = weakref.ref(cache_of(output).layers[1].keys)
    by_hand = TrimmedCache(model, {})
    generate(model, inputs, cache=by_hand)
    del output
    assert cache() is None, "freed at once, without the garbage collector"
    assert keys() is None
    model_ref = weakref.ref(model)
    del model
    gc.collect()
    assert model_ref() is None, "a cache does not keep its model"
    assert by_hand.report().kept_tokens


def test_a_failed_generation_keeps_nothing_alive(model, inputs):
    def broken(scores, visible):
        raise ArithmeticError

    states = []
    handle = model.model.multi_modal_projector.register_forward_hook(
        lambda _module, _args, output: states.append(weakref.ref(output))
    )
    with pytest.raises(ArithmeticError):
        trimmed(model, inputs, {"processors": [broken]})
    handle.remove()
    gc.collect()
    assert [ref() for ref in states] == [None]


def test_unregister_and_register(model, inputs):
    expected = trimmed(model, inputs, {"top_k_ratio": 0.2}).sequences
    trim_plugin.unregister()
    with pytest.raises(ValueError, match="trimmed"):
        trimmed(model, inputs, {})
    by_hand = generate(model, inputs, cache=TrimmedCache(model, {"top_k_ratio": 0.2}))
    assert torch.equal(expected, by_hand.sequences)
    trim_plugin.register()
    trim_plugin.register()
    assert torch.equal(expected, trimmed(model, inputs, {"top_k_ratio": 0.2}).sequences)
