"""Quantized cross-attention layers: what they hold, what they present, and that nothing is ever quantized twice."""

import importlib.util
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import cache_utils

from trim_plugin import TrimConfig, TrimmedCache
from trim_plugin.cache.blocks import Blocks
from trim_plugin.cache.layers import CrossAttentionLayer, Plain
from trim_plugin.compat import CACHE, cache_of, slices_mask_rows
from trim_plugin.kv_formats import require_bitsandbytes

from ..random_models import Sample, generate, largest_difference, random_inputs, random_model, trimmed

FORMATS = ("int8", "nf4")
needs_fp8 = pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"),
    reason="this transformers has no quantized layer without extra packages",
)
needs_masks_of_new_rows = pytest.mark.skipif(
    not slices_mask_rows(), reason="this transformers fails on masks of the new rows alone"
)
PAIR = [Sample((1, (6,), 6)), Sample((2, (1,), 3))]


def relative_error(ours, theirs):
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def stored_in(states, format):
    """Keys and values that are the same states, in a format."""
    return Blocks.of(Plain(states, states), format)


def rounded(states, format):
    return stored_in(states, format).read()[0]


@pytest.mark.parametrize(("format", "limit"), [("int8", 0.008), ("nf4", 0.11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(format, limit, dtype):
    states = torch.randn(3, 8, 50, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    store = stored_in(states, format)
    back, _ = store.read()
    assert (back.shape, back.dtype) == (states.shape, dtype)
    assert relative_error(back, states) < limit
    values = states.numel()
    codes, scales = store.tensors[:2]
    assert codes.nbytes == (values if format == "int8" else values // 2)
    assert scales.nbytes == values // 64 * 4


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("head_dim", [8, 24, 64])
def test_no_value_depends_on_another_token_or_sample(format, head_dim):
    states = torch.randn(3, 2, 7, head_dim)
    back = rounded(states, format)
    for sample in range(3):
        for token in range(7):
            alone = states[sample : sample + 1, :, token : token + 1]
            assert torch.equal(rounded(alone, format)[0, :, 0], back[sample, :, token])


def with_round_trips(model, settings, format):
    """The reference: a cache that holds full tensors, quantized and dequantized once at the end of the prompt's forward."""

    class RoundTripCache(TrimmedCache):
        def new_layers(self, *args, **kwargs):
            layers = super().new_layers(*args, **kwargs)
            for index in self.cross_layers:
                layers[index] = CrossAttentionLayer(lambda plain: Plain(*Blocks.of(plain, format).read()))
            return layers

    return RoundTripCache(model, settings)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("ratio", [0.25, 1.0])
@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=str,
)
def test_generation_equals_decoding_from_rounded_tensors(model, format, ratio, mode):
    inputs = random_inputs(model, PAIR)
    torch.manual_seed(1)
    ours = trimmed(model, inputs, {"top_k_ratio": ratio, "kv_quantization": format}, **mode)
    torch.manual_seed(1)
    cache = with_round_trips(model, {"top_k_ratio": ratio}, format)
    theirs = generate(model, inputs, cache=cache, **mode)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert largest_difference(ours, theirs) <= 1e-5


@needs_masks_of_new_rows
def test_prompt_lookup_equals_decoding_from_rounded_tensors(model):
    inputs = random_inputs(model, [Sample((1, (6,), 6))])
    ours = trimmed(model, inputs, {"kv_quantization": "int8"}, prompt_lookup_num_tokens=2)
    cache = with_round_trips(model, {}, "int8")
    theirs = generate(model, inputs, cache=cache, prompt_lookup_num_tokens=2)
    assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.parametrize("ratio", [0.25, 1.0])
@pytest.mark.parametrize(("format", "limit"), [("int8", 0.02), ("nf4", 0.25)])
def test_prefill_is_untouched_and_decoding_close(model, format, limit, ratio):
    inputs = random_inputs(model, PAIR)
    plain = trimmed(model, inputs, {"top_k_ratio": ratio})
    ours = trimmed(model, inputs, {"top_k_ratio": ratio, "kv_quantization": format})
    assert torch.equal(ours.logits[0], plain.logits[0])
    assert [kept.tolist() for kept in cache_of(ours).kept_indices] == [
        kept.tolist() for kept in cache_of(plain).kept_indices
    ]
    assert 0 < relative_error(ours.logits[1], plain.logits[1]) < limit


def test_kept_tokens_are_quantized_once_and_each_class_dequantized_once_a_step(model, monkeypatch):
    read, quantized = [], []
    whole, of = Blocks.read, Blocks.of.__func__
    monkeypatch.setattr(Blocks, "read", lambda self: read.append(self.shape) or whole(self))
    monkeypatch.setattr(
        Blocks, "of", classmethod(lambda cls, store, format: quantized.append(store.shape) or of(cls, store, format))
    )
    inputs = random_inputs(model, PAIR)
    output = trimmed(model, inputs, {"top_k_ratio": 0.1, "kv_quantization": "int8"}, new=6)
    shapes = [(len(own.sources), own.width) for own in cache_of(output).kept.classes]
    assert len(shapes) == 2
    assert sorted(quantized) == sorted(2 * shapes)  # two layers
    assert sorted(read) == sorted(5 * 2 * shapes)  # five steps after the first token


@needs_masks_of_new_rows
def test_a_picture_in_a_later_turn(model):
    first, second = random_inputs(model, [Sample((1, (6,), 4))]), random_inputs(model, [Sample((1, (6,), 4, (3,), 5))])
    length = first["input_ids"].shape[1]
    second["input_ids"][:, :length] = first["input_ids"]
    second["pixel_values"][:, :1] = first["pixel_values"]
    results = []
    for cache in (
        TrimmedCache(model, {"top_k_ratio": 0.5}),
        TrimmedCache(model, {"top_k_ratio": 0.5, "kv_quantization": "int8"}),
    ):
        with torch.no_grad():
            model(**first, **{CACHE: cache}, use_cache=True)
            turn = {
                "input_ids": second["input_ids"][:, length:],
                "attention_mask": second["attention_mask"],
                "cross_attention_mask": second["cross_attention_mask"][:, length:].clone(),
                **{name: second[name][:, 1:] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")},
            }
            turn["cross_attention_mask"][..., :1, :] = 1  # the earlier picture stays in sight
            logits = model(**turn, **{CACHE: cache}, use_cache=True).logits
            step = model(
                input_ids=torch.tensor([[5]]), **{CACHE: cache}, use_cache=True,
                cross_attention_mask=turn["cross_attention_mask"][:, -1:],
            ).logits  # fmt: skip
        results.append((logits, step, cache))
    (logits, step, plain), (our_logits, our_step, ours) = results
    assert relative_error(our_logits, logits) < 0.02
    assert relative_error(our_step, step) < 0.02
    assert ours.kept_indices[0].tolist() == plain.kept_indices[0].tolist()
    assert ours.kept_indices[0][-1] >= 20  # tokens of the second picture


def test_the_report_counts_codes_and_scales():
    model = random_model(width=64, heads=4, kv_heads=4).to(torch.bfloat16)  # 64 values a token and layer: whole blocks
    inputs = random_inputs(model, [Sample((1, (6,), 6))])
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    settings = {"top_k_ratio": 0.25}
    reports = {
        name: cache_of(trimmed(model, inputs, {**settings, "kv_quantization": name})).report()
        for name in (None, *FORMATS)
    }
    full = reports[None].cross_kv_bytes
    assert reports["int8"].cross_kv_bytes == full // 2 + full // 2 // 16
    assert reports["nf4"].cross_kv_bytes == full // 4 + full // 2 // 16
    assert len({report.stock_cross_kv_bytes for report in reports.values()}) == 1
    assert len({report.kept_tokens[0] for report in reports.values()}) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_pictures_change_the_answer(model, format):
    inputs = random_inputs(model, [Sample((1, (6,), 6))])
    other = dict(inputs, pixel_values=inputs["pixel_values"] + 1.0)
    config = {"kv_quantization": format}
    assert largest_difference(trimmed(model, inputs, config), trimmed(model, other, config)) > 1e-2


def decode_calls(model, inputs, **settings):
    """How often a cross-attention layer runs in a generation of 5 tokens."""
    calls = []
    handle = model.model.language_model.layers[3].register_forward_pre_hook(lambda *_: calls.append(1))
    output = generate(model, inputs, 5, **settings)
    handle.remove()
    return len(calls), output


@needs_fp8
def test_stock_quantized_cache_forgets_the_picture_and_ours_does_not(model):
    inputs = random_inputs(model, [Sample((1, (6,), 6))])
    stock_calls, stock = decode_calls(model, inputs)
    forgetful_calls, forgetful = decode_calls(
        model, inputs, cache_implementation="quantized", cache_config={"backend": "fp8"}
    )
    our_calls, ours = decode_calls(
        model,
        inputs,
        cache_implementation="trimmed",
        cache_config={"top_k_ratio": 1.0, "kv_quantization": "int8", "self_kv_quantization": "fp8"},
    )
    assert (stock_calls, forgetful_calls, our_calls) == (5, 1, 5)  # only the prefill sees the picture
    assert relative_error(forgetful.logits[1], stock.logits[1]) > 0.3
    assert relative_error(ours.logits[1], stock.logits[1]) < 0.15


@needs_fp8
def test_self_attention_layers_can_be_quantized_by_transformers(model):
    inputs = random_inputs(model, PAIR)
    plain = trimmed(model, inputs, {})
    ours = trimmed(model, inputs, {"self_kv_quantization": "fp8"})
    assert torch.equal(ours.logits[0], plain.logits[0])
    assert 0 < relative_error(ours.logits[1], plain.logits[1]) < 0.2
    report, full = cache_of(ours).report(), cache_of(plain).report()
    assert report.cross_kv_bytes == full.cross_kv_bytes
    assert report.self_kv_bytes < 0.3 * full.self_kv_bytes
    for method, argument in [("crop", -1), ("batch_repeat_interleave", 2), ("batch_select_indices", torch.tensor([0]))]:
        with pytest.raises(ValueError, match=f"{method} is not possible with self_kv_quantization='fp8'"):
            getattr(cache_of(ours), method)(argument)
    text = trimmed(model, random_inputs(model, [Sample((6,)), Sample((3,))]), {"self_kv_quantization": "fp8"})
    assert [kept.numel() for kept in cache_of(text).kept_indices] == [0, 0]


def test_stock_trimmed_and_quantized_alternate_and_run_in_threads(model):
    inputs = [random_inputs(model, [Sample((1, (6,), 6))]), random_inputs(model, PAIR, seed=1)]
    settings = [
        {},
        {"cache_implementation": "trimmed", "cache_config": {"top_k_ratio": 0.25}},
        {"cache_implementation": "trimmed", "cache_config": {"top_k_ratio": 0.25, "kv_quantization": "int8"}},
    ]
    jobs = [(entry, way) for entry in inputs for way in settings]
    expected = [generate(model, entry, **way) for entry, way in jobs]
    for turn in ([0, 2, 1, 2, 0, 5, 3, 4], [5, 4, 3, 2, 1, 0]):
        for job in turn:
            again = generate(model, jobs[job][0], **jobs[job][1])
            assert largest_difference(again, expected[job]) == 0.0
    with ThreadPoolExecutor(2) as pool:
        order = [*range(6), *reversed(range(6))]
        for job, result in zip(
            order, pool.map(lambda n: generate(model, jobs[n][0], **jobs[n][1]), order), strict=True
        ):
            assert torch.equal(result.sequences, expected[job].sequences)
            assert largest_difference(result, expected[job]) <= 1e-6


@pytest.mark.parametrize("name", ["kv_quantization", "self_kv_quantization"])
@pytest.mark.parametrize("value", ["int4", "NF4", 8, True])
def test_bad_values(name, value):
    with pytest.raises(ValueError, match=f"{name} must be one of None, .*got"):
        TrimConfig(**{name: value})


def test_without_bitsandbytes_making_the_cache_says_what_to_install(model, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)
    )
    with pytest.raises(
        ImportError, match=r"kv_quantization='int8' needs bitsandbytes.*pip install bitsandbytes accelerate"
    ):
        TrimmedCache(model, {"kv_quantization": "int8"})
    runs = []
    model.model.vision_model.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(ImportError, match="pip install bitsandbytes accelerate"):
        trimmed(model, random_inputs(model, PAIR), {"kv_quantization": "nf4"})
    assert runs == []  # before any work
    TrimmedCache(model, {})
    with pytest.raises(ImportError, match="something needs bitsandbytes"):
        require_bitsandbytes("something")


def test_nobody_else_imports_bitsandbytes():
    program = (
        "import sys, trim_plugin; from trim_plugin.cache import blocks; from tests.random_models import *;"
        "m = random_model(); trimmed(m, random_inputs(m, [Sample((1, (6,), 6))]), {}, 2);"
        "sys.exit('bitsandbytes' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_kernels_that_could_not_be_fetched_are_not_announced(caplog):
    require_bitsandbytes("a test")
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no kernels")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
