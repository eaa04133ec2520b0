"""Exact mode gives stock's tokens and logits; trimmed mode keeps what the independent rule keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trim_plugin
from trim_plugin import compat
from trim_plugin.compat import cache_of

from ..random_models import Sample, generate, largest_difference, random_inputs, random_model, trimmed
from ..reference_rule import check_kept, first_cross_attention_map
from .strategies import batches_with_equally_many_pictures, batches_with_pictures, mixed_batches, model_settings

relaxed = settings(settings.get_profile("ci"))


def assert_same(stock, ours):
    assert torch.equal(stock.sequences, ours.sequences)
    assert largest_difference(stock, ours) <= 1e-5


@relaxed
@given(model_settings, mixed_batches, st.integers(0, 99), st.booleans())
def test_exact_equals_stock(model_kwargs, samples, seed, pad_rows_see):
    model = random_model(**model_kwargs)
    inputs = random_inputs(model, samples, seed, pad_rows_see)
    assert_same(generate(model, inputs, 6), trimmed(model, inputs, {"top_k_ratio": 1.0}, 6))


@relaxed
@given(model_settings, mixed_batches, st.integers(0, 99), st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.9]), st.booleans())
def test_kept_indices_follow_the_rule(model_kwargs, samples, seed, ratio, pad_rows_see):
    model = random_model(**model_kwargs)
    inputs = random_inputs(model, samples, seed, pad_rows_see)
    cache = cache_of(trimmed(model, inputs, {"top_k_ratio": ratio}, 2))
    if "pixel_values" not in inputs:
        assert [len(kept) for kept in cache.kept_indices] == [0] * len(samples)
        return
    check_kept(cache.kept_indices, model, inputs, ratio)


# With equal numbers of pictures: blind rows read everything in stock, also the empty pictures that pad a batch.
@relaxed
@given(model_settings, batches_with_equally_many_pictures, st.integers(0, 99))
def test_a_sample_is_trimmed_alike_alone_and_in_a_batch(model_kwargs, samples, seed):
    model = random_model(**model_kwargs)
    together = random_inputs(model, samples, seed)
    whole = trimmed(model, together, {"top_k_ratio": 0.2}, 4)
    for index, sample in enumerate(samples):
        length = int(together["attention_mask"][index].sum())
        images = len(sample.pictures)
        alone = {
            "input_ids": together["input_ids"][index : index + 1, -length:],
            "attention_mask": together["attention_mask"][index : index + 1, -length:],
            "cross_attention_mask": together["cross_attention_mask"][index : index + 1, -length:, :images],
            **{
                name: together[name][index : index + 1, :images]
                for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
            },
        }
        single = trimmed(model, alone, {"top_k_ratio": 0.2}, 4)
        assert torch.equal(cache_of(single).kept_indices[0], cache_of(whole).kept_indices[index])
        assert torch.equal(single.sequences[0, -4:], whole.sequences[index, -4:])


@relaxed
@given(model_settings, batches_with_pictures, st.integers(0, 99), st.integers(0, 2**20))
def test_sampling_equals_stock(model_kwargs, samples, seed, torch_seed):
    model = random_model(**model_kwargs)
    inputs = random_inputs(model, samples, seed)
    runs = []
    for kwargs in ({}, {"cache_implementation": "trimmed", "cache_config": {"top_k_ratio": 1.0}}):
        torch.manual_seed(torch_seed)
        runs.append(generate(model, inputs, 6, do_sample=True, temperature=1.5, **kwargs))
    assert_same(*runs)


def test_where_layer_0_is_a_cross_layer_the_reference_is_no_cache():
    model = random_model(layers=4, cross_layers=(0, 2))
    inputs = random_inputs(model, [Sample((1, (6,), 4)), Sample(((1,), 7))])
    stock = generate(model, inputs, 6, use_cache=False)
    assert_same(stock, trimmed(model, inputs, {"top_k_ratio": 1.0}, 6))
    kept = cache_of(trimmed(model, inputs, {"top_k_ratio": 0.1}, 2)).kept_indices
    check_kept(kept, model, inputs, 0.1)
    text = random_inputs(model, [Sample((7,))])
    assert_same(generate(model, text, 6, use_cache=False), trimmed(model, text, {"top_k_ratio": 0.1}, 6))


@pytest.mark.parametrize(
    ("parts", "limit"),
    [
        ((2, (1,), 5), 0.26),
        ((2, (2,), 5), 0.51),
        ((2, (5,), 5), 0.51),
        ((2, (6,), 4, (6,), 5), 0.51),
        ((2, (6,), 5), 1.0),
    ],
)
def test_exact_mode_is_small_and_equal_for_64_tokens(parts, limit):
    model = random_model(seed=3)
    inputs = random_inputs(model, [Sample(parts)])
    ours = trimmed(model, inputs, {"top_k_ratio": 1.0}, 64)
    assert_same(generate(model, inputs, 64), ours)
    report = cache_of(ours).report()
    assert 0 < report.cross_kv_bytes <= limit * report.stock_cross_kv_bytes


def test_sdpa_and_eager_keep_the_same():
    kept = []
    for attention in ("sdpa", "eager"):
        model = random_model(seed=5, attention=attention)
        inputs = random_inputs(model, [Sample((1, (6,), 6)), Sample((1, (3,), 2))])
        kept.append(cache_of(trimmed(model, inputs, {"top_k_ratio": 0.2}, 2)).kept_indices)
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_bfloat16_keeps_nearly_what_the_rule_keeps():
    model = random_model(seed=5, image_size=16).to(torch.bfloat16)
    inputs = random_inputs(model, [Sample((1, (6,), 6))])
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    check_kept(cache_of(trimmed(model, inputs, {"top_k_ratio": 0.2}, 2)).kept_indices, model, inputs, 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_another_rule_keeps_is_told_apart(dtype):
    """Guards `check_kept`: rounding explains neither a tenth more or fewer tokens a head nor another one in place of the best."""
    model = random_model(seed=5, image_size=16).to(dtype)
    inputs = random_inputs(model, [Sample((1, (6,), 6))])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    for other in (0.1, 0.3):
        with pytest.raises(AssertionError, match=r"missing|too many"):
            check_kept(cache_of(trimmed(model, inputs, {"top_k_ratio": other}, 1)).kept_indices, model, inputs, 0.2)
    kept = cache_of(trimmed(model, inputs, {"top_k_ratio": 0.2}, 1)).kept_indices[0].tolist()
    best = first_cross_attention_map(model, inputs)[0, 0, 1:].float().mean(dim=0).argmax().item()
    with pytest.raises(AssertionError, match="missing"):
        check_kept([torch.tensor([token for token in kept if token != best])], model, inputs, 0.2)


def test_pictures_change_the_answer(model):
    """Guards every comparison above: a cache that forgot the picture would make them meaningless."""
    inputs = random_inputs(model, [Sample((1, (6,), 6))])
    other = dict(inputs, pixel_values=inputs["pixel_values"] + 1.0)
    config = {"top_k_ratio": 0.25}
    assert largest_difference(trimmed(model, inputs, config), trimmed(model, other, config)) > 1e-2


def test_other_caches_are_untouched_by_import_and_hooks(model):
    inputs = random_inputs(model, [Sample((1, (2,), 6)), Sample((1, (1, 3), 4))])
    # Before its own static cache, transformers sized Mllama's cross-attention layers for the text.
    names = [None, "dynamic", "static"] if compat.compiles_mllama_decoding() else [None, "dynamic"]
    trim_plugin.unregister()
    before = [generate(model, inputs, cache_implementation=name, disable_compile=True) for name in names]
    trim_plugin.register()
    trimmed(model, inputs, {"top_k_ratio": 0.1})  # hooks are on the model from here on
    for name, stock in zip(names, before, strict=True):
        again = generate(model, inputs, cache_implementation=name, disable_compile=True)
        assert torch.equal(stock.sequences, again.sequences)
        assert largest_difference(stock, again) == 0.0
        assert type(cache_of(stock)) is type(cache_of(again))
