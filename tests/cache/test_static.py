"""A static trimmed cache: equal to the dynamic one, of fixed shape, and one compiled graph for many pictures."""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CompileConfig

from trim_plugin import TrimConfig, TrimmedCache, compat
from trim_plugin.compat import CACHE, cache_of

from ..exactness.strategies import mixed_batches, model_settings
from ..random_models import Sample, generate, largest_difference, random_inputs, random_model, trimmed

#: Formats of `kv_quantization` that this installation has.
FORMATS = ("int8", "nf4") if importlib.util.find_spec("bitsandbytes") is not None else ()
ONE = [Sample((1, (6,), 6))]


def graph_counter():
    """A compile configuration for every device whose backend only counts graphs, and the list that it counts in."""
    graphs: list[int] = []

    def backend(graph, example_inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return config, graphs


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    model_settings,
    mixed_batches,
    st.integers(0, 99),
    st.sampled_from([1.0, 0.25, 0.1]),
    st.sampled_from([8, 64]),
    st.sampled_from([None, *FORMATS]),
)
def test_static_equals_dynamic_and_stock(model_kwargs, samples, seed, ratio, bucket, kv_quantization):
    model = random_model(**model_kwargs)
    inputs = random_inputs(model, samples, seed)
    what = {"top_k_ratio": ratio, "kv_quantization": kv_quantization}
    dynamic = trimmed(model, inputs, what, 6)
    static = trimmed(model, inputs, what | {"static": True, "static_bucket": bucket}, 6, disable_compile=True)
    lossless = ratio == 1.0 and kv_quantization is None
    references = [dynamic, generate(model, inputs, 6)] if lossless else [dynamic]
    for reference in references:
        assert torch.equal(reference.sequences, static.sequences)
        assert largest_difference(reference, static) <= 1e-5
    kept = zip(cache_of(dynamic).kept_indices, cache_of(static).kept_indices, strict=True)
    assert all(torch.equal(first, second) for first, second in kept)
    for index in cache_of(static).cross_layers:
        layer = cache_of(static).layers[index]
        assert not layer.is_initialized or layer.keys.shape[2] % bucket == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("copies", [1, 3])
def test_a_prompt_of_one_token_reads_no_empty_buffer(attention, copies):
    """sdpa needs no mask for one row, unless the buffers are longer than the text."""
    model = random_model(attention=attention, cross_layers=(1, 3))
    inputs = random_inputs(model, [Sample((1,))])
    stock = generate(model, inputs, 5, num_beams=copies)
    static = trimmed(model, inputs, {"static": True, "static_bucket": 8}, 5, num_beams=copies, disable_compile=True)
    assert torch.equal(stock.sequences, static.sequences)
    assert largest_difference(stock, static) <= 1e-5
    cache = TrimmedCache(model, TrimConfig(static=True, max_cache_len=16))
    with torch.no_grad():
        by_hand = model(**inputs, **{CACHE: cache}, use_cache=True).logits
    assert float((by_hand - model(**inputs).logits).abs().max()) <= 1e-5


@pytest.mark.skipif(compat.compiles_mllama_decoding(), reason="this transformers compiles Mllama's decoding")
@pytest.mark.parametrize("given", [False, True])
def test_where_transformers_does_not_compile_mllama_nothing_is_compiled(given):
    model = random_model(seed=2)
    compile_config, graphs = graph_counter()
    settings = {"top_k_ratio": 0.2, "static": True, "static_bucket": 8, "max_cache_len": 64}
    inputs, what = random_inputs(model, ONE), {"compile_config": compile_config}
    if given:
        generate(model, inputs, 4, cache=TrimmedCache(model, settings), **what)
    else:
        trimmed(model, inputs, settings, 4, **what)
    assert graphs == []
    assert not model.generation_config.disable_compile


@pytest.mark.skipif(
    not compat.compiles_mllama_decoding(), reason="this transformers does not compile Mllama's decoding"
)
@pytest.mark.parametrize("kv_quantization", [None, *FORMATS])
@pytest.mark.parametrize("ratio", [1.0, 0.2])
def test_one_graph_for_ten_pictures_and_longer_prompts(ratio, kv_quantization):
    torch._dynamo.reset()
    model = random_model(seed=2)
    compile_config, graphs = graph_counter()
    what = {"top_k_ratio": ratio, "kv_quantization": kv_quantization}
    settings = what | {"static": True, "static_bucket": 64, "max_cache_len": 64}
    for number in range(10):
        inputs = random_inputs(model, [Sample((1 + number % 3, (1 + number % 8,), 4 + number))], seed=number)
        compiled = trimmed(model, inputs, settings, 12, compile_config=compile_config)
        eager = trimmed(model, inputs, what, 12)
        assert torch.equal(compiled.sequences, eager.sequences)
        assert largest_difference(compiled, eager) <= 1e-5
    assert len(graphs) == 1


@pytest.mark.skipif(
    not compat.compiles_mllama_decoding(), reason="this transformers does not compile Mllama's decoding"
)
def test_another_bucket_is_another_graph_and_so_is_another_batch():
    """So that the count above means something."""
    torch._dynamo.reset()
    model = random_model(seed=2)
    compile_config, graphs = graph_counter()
    settings = {"top_k_ratio": 1.0, "static": True, "static_bucket": 8, "max_cache_len": 64}
    for samples in (ONE, [Sample((1, (1,), 6))], [Sample((1, (1,), 6)), Sample((1, (2,), 6))]):
        trimmed(model, random_inputs(model, samples), settings, 4, compile_config=compile_config)
    assert len(graphs) >= 3


@pytest.mark.skipif(
    not compat.compiles_mllama_decoding(), reason="this transformers does not compile Mllama's decoding"
)
def test_compiled_batches_sampling_and_128_tokens():
    torch._dynamo.reset()
    model = random_model(seed=4)
    compile_config, graphs = graph_counter()
    inputs = random_inputs(model, [Sample((1, (6,), 6)), Sample((2, (1,), 3)), Sample((7,))])
    settings = {"top_k_ratio": 1.0, "static": True, "static_bucket": 32}
    stock = generate(model, inputs, 128)
    ours = trimmed(model, inputs, settings, 128, compile_config=compile_config)
    assert torch.equal(stock.sequences, ours.sequences)
    assert largest_difference(stock, ours) <= 1e-5
    runs = []
    for kwargs in ({}, {"cache_implementation": "trimmed", "cache_config": settings, "compile_config": compile_config}):
        torch.manual_seed(0)
        runs.append(generate(model, inputs, 16, do_sample=True, **kwargs))
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert graphs


@pytest.mark.skipif(
    not compat.compiles_mllama_decoding(), reason="this transformers does not compile Mllama's decoding"
)
@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 8))])
def test_128_compiled_tokens_equal_stock_and_eager_on_many_models(seed):
    """Random shapes of model, batch and bucket; the property test above compares a few tokens of many more, uncompiled."""
    torch._dynamo.reset()
    draw = random.Random(seed)
    heads, kv_heads = draw.choice([(4, 2), (4, 4), (2, 1)])
    model = random_model(
        seed,
        heads=heads,
        kv_heads=kv_heads,
        layers=draw.choice([4, 6]),
        cross_layers=draw.choice([(1, 3), (2,), (0, 2)]),
        attention=draw.choice(["sdpa", "eager"]),
    )
    samples = [Sample((1, (draw.randint(1, 8),), draw.randint(3, 9))) for _ in range(draw.randint(1, 3))]
    inputs = random_inputs(model, samples, seed)
    compile_config, graphs = graph_counter()
    static = {"static": True, "static_bucket": draw.choice([8, 32])}
    for ratio in (1.0, draw.choice([0.3, 0.1])):
        eager = trimmed(model, inputs, {"top_k_ratio": ratio}, 128)
        compiled = trimmed(model, inputs, {"top_k_ratio": ratio, **static}, 128, compile_config=compile_config)
        references = [eager]
        if ratio == 1.0 and 0 not in model.config.text_config.cross_attention_layers:  # there stock itself fails
            references.append(generate(model, inputs, 128))
        for reference in references:
            assert torch.equal(reference.sequences, compiled.sequences)
            assert largest_difference(reference, compiled) <= 1e-5
    assert graphs


@pytest.mark.parametrize("kv_quantization", [None, *FORMATS])
def test_buffers_are_kept_and_filled_again(model, kv_quantization):
    what = {"top_k_ratio": 0.1, "kv_quantization": kv_quantization}
    cache = TrimmedCache(model, TrimConfig(**what, static=True, static_bucket=32, max_cache_len=64))
    pointers, held = [], []
    for seed in (0, 1):
        inputs = random_inputs(model, [Sample((1, (1 + seed,), 6))], seed)
        ours = generate(model, inputs, cache=cache, disable_compile=True)
        assert torch.equal(ours.sequences, trimmed(model, inputs, what).sequences)
        layers = [cache.layers[index].held_tensors() for index in cache.cross_layers]
        pointers.append([tensor.data_ptr() for tensors in layers for tensor in tensors])
        held.append(cache.report().cross_kv_bytes)
        cache.reset()
    assert pointers[0] == pointers[1]
    assert held[0] == held[1]


@pytest.mark.parametrize("format", FORMATS)
def test_quantized_buffers_hold_as_few_bytes_as_a_dynamic_cache_of_that_width(format):
    model = random_model(width=128, kv_heads=4)
    inputs = random_inputs(model, [Sample((1, (6,), 6))])
    reports = []
    for extra in ({}, {"static": True, "static_bucket": 4}):
        settings = {"top_k_ratio": 1.0, "kv_quantization": format, **extra}
        reports.append(cache_of(trimmed(model, inputs, settings, 4, disable_compile=True)).report())
    dynamic, static = reports
    width = -(-dynamic.kept_tokens[0] // 4) * 4
    assert static.cross_kv_bytes * dynamic.kept_tokens[0] == dynamic.cross_kv_bytes * width


def test_beams_work_on_static_layers(model):
    inputs = random_inputs(model, ONE)
    settings = {"top_k_ratio": 0.2, "static": True}
    static = model.generate(
        **inputs,
        max_new_tokens=6,
        num_beams=3,
        cache_implementation="trimmed",
        cache_config=settings,
        disable_compile=True,
    )
    assert torch.equal(
        static,
        model.generate(
            **inputs, max_new_tokens=6, num_beams=3, cache_implementation="trimmed", cache_config={"top_k_ratio": 0.2}
        ),
    )


def test_a_follow_up_with_a_new_picture_fills_the_buffers_anew(model):
    whole = random_inputs(model, [Sample((1, (6,), 4, (1,), 5))])
    length = 6
    first = {
        "input_ids": whole["input_ids"][:, :length],
        "cross_attention_mask": whole["cross_attention_mask"][:, :length, :1],
        **{name: whole[name][:, :1] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")},
    }
    second = {
        "input_ids": whole["input_ids"],
        "cross_attention_mask": whole["cross_attention_mask"],
        **{name: whole[name][:, 1:] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")},
    }
    sequences = []
    for extra in ({}, {"static": True, "static_bucket": 16, "max_cache_len": 40}):
        cache = TrimmedCache(model, TrimConfig(top_k_ratio=1.0, **extra))
        with torch.no_grad():
            model(**first, **{CACHE: cache}, use_cache=True)
        out = generate(model, second, cache=cache, disable_compile=True)
        sequences.append(out.sequences)
        assert len(cache.kept_indices[0]) == 5
    assert torch.equal(*sequences)
    assert torch.equal(sequences[0], generate(model, whole).sequences)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"static": 1}, "static must be True or False"),
        ({"static": True, "static_bucket": 0}, "static_bucket must be a positive integer"),
        ({"static": True, "max_cache_len": -1}, "max_cache_len must be a positive integer"),
        ({"static": True, "self_kv_quantization": "fp8"}, "static=True and self_kv_quantization='fp8' are both given"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TrimConfig(**settings)


def test_by_hand_it_needs_a_length(model):
    with pytest.raises(ValueError, match="needs to know how long the text can get"):
        TrimmedCache(model, TrimConfig(static=True))


def test_prompt_lookup_says_what_it_needs(model):
    with pytest.raises(NotImplementedError, match="static=False"):
        trimmed(model, random_inputs(model, ONE), {"static": True}, 4, prompt_lookup_num_tokens=2)


@pytest.mark.skipif(
    not compat.compiles_mllama_decoding(), reason="this transformers does not compile Mllama's decoding"
)
def test_shorter_and_longer_calls_compile_as_often_as_stock():
    """Stock remembers its longest length on the model; here it is remembered beside it, with as many graphs."""
    inputs = random_inputs(random_model(seed=2), ONE)
    lengths, counts, tokens = (12, 6, 9, 20, 5, 20), {}, {}
    for name, named in {
        "static": {"cache_implementation": "static"},
        "trimmed": {"cache_implementation": "trimmed", "cache_config": {"top_k_ratio": 1.0, "static": True}},
    }.items():
        torch._dynamo.reset()
        model = random_model(seed=2)
        attributes = set(vars(model))
        compile_config, graphs = graph_counter()
        counts[name], tokens[name] = [], []
        for new in lengths:
            output = generate(model, inputs, new, compile_config=compile_config, **named)
            counts[name].append(len(graphs))
            tokens[name].append(output.sequences.tolist())
        if name == "trimmed":
            assert {name for name in set(vars(model)) - attributes if "length" in name} == set()
    assert tokens["trimmed"] == tokens["static"]
    assert counts["trimmed"] == counts["static"]
    assert counts["trimmed"][2] == counts["trimmed"][0], "shorter calls reuse the graph"


def test_a_call_that_is_refused_is_not_remembered():
    model = random_model(seed=3)
    inputs = random_inputs(model, ONE)
    config = {"static": True, "top_k_ratio": 0.5}
    with pytest.raises(ValueError, match="aspect_ratio_ids"):
        trimmed(model, {name: tensor for name, tensor in inputs.items() if name != "aspect_ratio_ids"}, config, 500)
    lengths = []
    for new in (8, 20, 4):
        cache = cache_of(trimmed(model, inputs, config, new, disable_compile=True))
        lengths.append(cache.get_max_length())
    assert lengths[1] - lengths[0] == 12
    assert lengths[2] == lengths[1]
    other = cache_of(trimmed(random_model(seed=3), inputs, config, 4, disable_compile=True))
    assert other.get_max_length() == lengths[0] - 4, "another model starts anew"
