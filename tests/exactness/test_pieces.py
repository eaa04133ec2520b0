"""Prompts read in pieces, copies read once: the same tokens, logits, outputs and kept tokens as in one forward.

`pytest` runs 40 examples, `pytest -m slow` 1,000.
"""

from __future__ import annotations

import collections
import weakref
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trim_plugin.generation.micro_batches
from trim_plugin import KCenter, TrimConfig, TrimmedCache, compat, prefill
from trim_plugin.compat import cache_of
from trim_plugin.generation.micro_batches import Cut

from ..cache.test_static import graph_counter
from ..random_models import (
    PAIR,
    Sample,
    generate,
    largest_difference,
    largest_logit,
    random_inputs,
    random_model,
    trimmed,
)
from .conversations import converse
from .strategies import mixed_batches, model_settings

BATCH = [Sample((2, (6,), 5)), Sample((1, (2,), 3, (1, 3), 4)), Sample((4,)), Sample(((7, 8), 2))]
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "returned": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
}
KINDS = {
    "exact": {"top_k_ratio": 1.0},
    "dropped": {"top_k_ratio": 0.2, "merge": False},
    "merged": {"top_k_ratio": 0.1},
    "k-center": {"processors": [KCenter(0.3)]},
    "static": {"top_k_ratio": 0.2, "static": True, "static_bucket": 8},
}


def in_one_piece():
    """Within this context nothing is cut and every copy is read."""
    return mock.patch.object(
        trim_plugin.generation.micro_batches,
        "cut",
        lambda cache, inputs, batch, vision_config, copies: Cut(batch, batch),
    )


def seeded(seed, *args, **kwargs):
    torch.manual_seed(seed)
    return trimmed(*args, **kwargs)


def assert_same(ours, theirs, tolerance=1e-5):
    assert torch.equal(ours.sequences, theirs.sequences)
    assert largest_difference(ours, theirs) <= tolerance * largest_logit(theirs)
    mine, reference = cache_of(ours), cache_of(theirs)
    for name in ("kept_indices", "kept_sizes"):
        for one, other in zip(getattr(mine, name), getattr(reference, name), strict=True):
            assert torch.equal(one, other)


def run(profile, capsys):
    count = collections.Counter()

    @settings(settings.get_profile(profile))
    @given(
        model_settings,
        mixed_batches,
        st.sampled_from([*MODES]),
        st.sampled_from([*KINDS]),
        st.integers(1, 3),
        st.integers(0, 2**16),
    )
    def examples(model_kwargs, samples, mode, kind, at_a_time, seed):
        model = random_model(**model_kwargs)
        inputs = random_inputs(model, samples, seed)
        config = KINDS[kind] | {"prefill_pictures": at_a_time}
        with in_one_piece():
            whole = seeded(seed, model, inputs, KINDS[kind], new=5, **MODES[mode])
        assert_same(seeded(seed, model, inputs, config, new=5, **MODES[mode]), whole)
        if kind == "exact":
            torch.manual_seed(seed)
            stock = generate(model, inputs, 5, **MODES[mode])
            assert torch.equal(stock.sequences, whole.sequences)
        count[f"{kind}, {mode}"] += 1

    examples()
    with capsys.disabled():
        print(f"\npieces: {sum(count.values())} examples, {len(count)} combinations")
    return sum(count.values())


def test_pieces_equal_the_whole(capsys):
    assert run("ci", capsys) >= settings.get_profile("ci").max_examples


@pytest.mark.slow
def test_pieces_equal_the_whole_at_length(capsys):
    assert run("slow", capsys) >= 1000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_quantization", ["int8", "nf4"])
def test_quantized_kv(kind, kv_quantization):
    pytest.importorskip("bitsandbytes")
    model = random_model(seed=3, width=128, heads=2, kv_heads=2)
    inputs = random_inputs(model, BATCH)
    config = KINDS[kind] | {"kv_quantization": kv_quantization}
    with in_one_piece():
        whole = trimmed(model, inputs, config, num_beams=2)
    assert_same(trimmed(model, inputs, config | {"prefill_pictures": 1}, num_beams=2), whole)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_output_field(kind, attention):
    model = random_model(seed=4, attention=attention)
    inputs = random_inputs(model, BATCH)
    fields = {"output_hidden_states": True, "output_scores": True, "output_attentions": attention == "eager"}
    with in_one_piece():
        whole = trimmed(model, inputs, KINDS[kind], num_beams=2, **fields)
    ours = trimmed(model, inputs, KINDS[kind] | {"prefill_pictures": 1}, num_beams=2, **fields)
    assert_same(ours, whole)
    text = inputs["attention_mask"].repeat_interleave(2, dim=0).bool()
    for name in ("hidden_states", "scores", *(("attentions",) if attention == "eager" else ())):
        mine, reference = flat(ours[name]), flat(whole[name])
        assert len(mine) == len(reference) > 0
        for one, other in zip(mine, reference, strict=True):
            assert one.shape == other.shape
            if one.shape[:2] == text.shape:  # what padding makes of itself depends on the mask's width
                one, other = one[text], other[text]
            elif one.shape[-2] == text.shape[1]:
                one, other = one.transpose(1, 2)[text], other.transpose(1, 2)[text]
            # Relative to what is compared: hidden states are not normalised.
            assert float((one - other).abs().amax()) <= 1e-5 * max(1.0, float(other[other.isfinite()].abs().amax()))


def flat(nested):
    return [nested] if isinstance(nested, torch.Tensor) else [one for part in nested for one in flat(part)]


@pytest.mark.parametrize("settings_of_mode", [{"num_return_sequences": 16, "do_sample": True}, {"num_beams": 8}])
def test_the_tower_sees_few_pictures_and_each_once(settings_of_mode):
    model = random_model(seed=5)
    inputs = random_inputs(model, [Sample(((6, 2), 3)), Sample((1, (3, 4), 2)), Sample((2, (5,), 1, (2,), 3))])
    seen = []
    handle = model.model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].clone()), with_kwargs=True
    )
    trimmed(model, inputs, {"top_k_ratio": 0.2, "prefill_pictures": 1}, **settings_of_mode)
    handle.remove()
    assert {tuple(pixels.shape[:2]) for pixels in seen} == {(1, 1)}
    assert torch.equal(torch.cat(seen)[:, 0], inputs["pixel_values"].flatten(0, 1))


@pytest.mark.parametrize("kv_quantization", [None, "nf4"])
def test_copies_are_held_once(kv_quantization):
    if kv_quantization:
        pytest.importorskip("bitsandbytes")
    model = random_model(seed=6, width=128, heads=2, kv_heads=2)
    inputs = random_inputs(model, [Sample((2, (6,), 5)), Sample((1, (2,), 3))])
    config = {"top_k_ratio": 1.0, "kv_quantization": kv_quantization}
    one = cache_of(trimmed(model, inputs, config)).report()
    many = cache_of(trimmed(model, inputs, config, num_return_sequences=16, do_sample=True)).report()
    assert many.cross_kv_bytes == one.cross_kv_bytes > 0
    assert many.stock_cross_kv_bytes == 16 * one.stock_cross_kv_bytes
    assert many.kept_tokens == [count for count in one.kept_tokens for _ in range(16)]


def test_reading_one_source_copies_nothing():
    model = random_model(seed=7)
    cache = cache_of(trimmed(model, random_inputs(model, BATCH[:1]), {"top_k_ratio": 0.3}, num_beams=4))
    for index in cache.cross_layers:
        layer = cache.layers[index]
        assert layer.keys.shape[0] == 4
        assert layer.keys.data_ptr() == layer.held_tensors()[0].data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_with_new_pictures(kind):
    if kind == "static":
        pytest.skip("a conversation's text in a static cache is read in one piece")
    model = random_model(seed=8)
    turns = [[Sample((2, (6,), 5)), Sample((1, (2,), 6))], [Sample((3, (4,), 2))] * 2, [Sample((4,))] * 2]
    ours = converse(model, TrimmedCache(model, KINDS[kind] | {"prefill_pictures": 1}), turns, 8, 4)
    with in_one_piece():
        whole = converse(model, TrimmedCache(model, KINDS[kind]), turns, 8, 4)
    for (_, one), (_, other) in zip(ours, whole, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("new_picture", [True, False])
def test_a_conversation_goes_on_from_several_returned(new_picture):
    """Copies part ways in the next turn: each then holds what is its own."""
    model = random_model(seed=9)
    inputs = random_inputs(model, [Sample((2, (6, 3), 5))])
    turn = Sample((3, (4,), 2)) if new_picture else Sample((4,))
    outputs = []
    for config, whole in (({"prefill_pictures": 1}, False), ({}, True)):
        cache = TrimmedCache(model, {"top_k_ratio": 0.2} | config)
        with in_one_piece() if whole else mock.MagicMock():
            torch.manual_seed(0)
            first = generate(model, inputs, cache=cache, do_sample=True, num_return_sequences=3)
            rows = first.sequences
            more = random_inputs(model, [turn], seed=1)
            mask = inputs["cross_attention_mask"].repeat(3, 1, 1, 1)
            mask = torch.cat([mask, mask[:, -1:].expand(-1, rows.shape[1] - mask.shape[1], -1, -1)], dim=1)
            text = more["input_ids"].repeat(3, 1)
            follow_up = {"input_ids": torch.cat([rows, text], dim=1)}
            if new_picture:
                seen = more["cross_attention_mask"].repeat(3, 1, 1, 1)
                old = torch.nn.functional.pad(mask, (0, 0, 0, 1))
                new = torch.nn.functional.pad(seen, (0, 0, mask.shape[2], 0))
                follow_up |= {
                    name: more[name].repeat(3, *[1] * (more[name].ndim - 1)) for name in more if name[0] in "pa"
                }
                follow_up["cross_attention_mask"] = torch.cat([old, new], dim=1)
            else:  # reads fewer pictures than before
                last = mask[:, -1:].expand(-1, text.shape[1], -1, -1).clone()
                last[:, :, 1] = 0
                follow_up["cross_attention_mask"] = torch.cat([mask, last], dim=1)
            follow_up["attention_mask"] = torch.ones_like(follow_up["input_ids"])
            outputs.append(generate(model, follow_up, cache=cache))
    assert_same(*outputs)
    held = cache_of(outputs[0])
    assert held.layers[held.cross_layers[0]].held_tensors()[0].shape[0] == 3


def test_selecting_samples_frees_the_pictures_that_nobody_reads():
    model = random_model(seed=10)
    cache = cache_of(trimmed(model, random_inputs(model, BATCH[:2]), {"top_k_ratio": 0.3}, num_beams=3))
    before = [tokens.clone() for tokens in cache.kept_indices]
    cache.batch_select_indices(torch.tensor([4, 5, 3]))
    assert {cache.layers[index].held_tensors()[0].shape[0] for index in cache.cross_layers} == {1}
    assert [tokens.tolist() for tokens in cache.kept_indices] == [before[row].tolist() for row in (4, 5, 3)]


def test_what_fails_midway_leaves_the_cache_as_it_was():
    model = random_model(seed=11)
    inputs = random_inputs(model, BATCH)
    cache = TrimmedCache(model, {"top_k_ratio": 0.3, "prefill_pictures": 1})
    calls = []

    def fail_at_the_third(module, args, kwargs):
        calls.append(module)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")

    handle = model.model.vision_model.register_forward_pre_hook(fail_at_the_third, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, inputs, cache=cache)
    handle.remove()
    assert cache.get_seq_length() == 0
    assert cache.report().cross_kv_bytes == 0
    assert_same(generate(model, inputs, cache=cache), trimmed(model, inputs, {"top_k_ratio": 0.3}))


def test_nan_in_any_piece_is_told_and_leaves_the_cache_as_it_was():
    """The checks of all pieces are looked at together, behind the last one."""
    model = random_model()
    inputs = random_inputs(model, BATCH)
    cache = TrimmedCache(model, {"prefill_pictures": 1})
    for sample in (0, 1, 3):
        pixel_values = inputs["pixel_values"].clone()
        pixel_values[sample, 0, 0] = float("nan")
        with pytest.raises(ValueError, match="visual states are NaN"):
            prefill(model, cache, **{**inputs, "pixel_values": pixel_values})
        assert cache.batch_size == -1
    prefill(model, cache, **inputs)
    whole = TrimmedCache(model)
    prefill(model, whole, **inputs)
    assert all(map(torch.equal, cache.kept_indices, whole.kept_indices))


def test_what_fails_while_parts_are_joined_is_told():
    model = random_model(seed=11)
    inputs = random_inputs(model, BATCH)
    cache = TrimmedCache(model, {"top_k_ratio": 0.3, "prefill_pictures": 1})
    with (
        mock.patch.object(type(cache.layers[3]), "regroup", side_effect=torch.OutOfMemoryError("out of memory")),
        pytest.raises(torch.OutOfMemoryError),
    ):
        generate(model, inputs, cache=cache)
    with pytest.raises(ValueError, match="left over from a forward that failed"):
        generate(model, inputs, cache=cache)
    cache.reset()
    assert_same(generate(model, inputs, cache=cache), trimmed(model, inputs, {"top_k_ratio": 0.3}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_by_hand_reads_in_pieces_too(kind):
    model = random_model(seed=12)
    inputs = random_inputs(model, BATCH)
    cache = TrimmedCache(model, KINDS[kind] | {"prefill_pictures": 1}, max_cache_len=40)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    output = prefill(model, cache, **inputs, position_ids=positions)
    assert cache_of(output) is cache
    expected = trimmed(model, inputs, KINDS[kind], new=1)
    assert float((output.logits[:, -1] - expected.logits[0]).abs().max()) <= 1e-5
    assert [one.tolist() for one in cache.kept_indices] == [one.tolist() for one in cache_of(expected).kept_indices]


def test_what_the_tower_yields_is_not_held_while_further_pieces_are_read():
    """transformers 5.24 returns it with every forward; at 11B it is a tenth of the tower's own working set, for every picture."""
    model = random_model(seed=12)
    yielded = []

    def note(tower, args, output):
        assert not [one for one in yielded if one() is not None], "an earlier piece's"
        yielded.append(weakref.ref(output.last_hidden_state))

    model.model.vision_model.register_forward_hook(note)
    output = prefill(model, TrimmedCache(model, {"prefill_pictures": 1}), **random_inputs(model, PAIR))
    assert len(yielded) == 2
    assert getattr(output, "image_outputs", None) is None


def test_a_loop_by_hand_needs_text():
    model = random_model()
    with pytest.raises(ValueError, match="Give input_ids or inputs_embeds"):
        prefill(model, TrimmedCache(model))


@pytest.mark.parametrize("at_a_time", [0, -1, 1.5, True, "2"])
def test_prefill_pictures_is_checked(at_a_time):
    with pytest.raises(ValueError, match="prefill_pictures must be a positive integer"):
        TrimConfig(prefill_pictures=at_a_time)


@pytest.mark.skipif(
    not compat.compiles_mllama_decoding(), reason="this transformers does not compile Mllama's decoding"
)
@pytest.mark.parametrize("samples", [BATCH[:1], BATCH[:2]])
def test_one_graph_reads_the_copies_of_many_pictures(samples):
    torch._dynamo.reset()
    model = random_model(seed=13)
    compile_config, graphs = graph_counter()
    config = {"top_k_ratio": 0.2, "prefill_pictures": 1}
    static = config | {"static": True, "static_bucket": 64, "max_cache_len": 64}
    for seed in range(4):
        inputs = random_inputs(model, samples, seed)
        mode = {"do_sample": True, "num_return_sequences": 3}
        compiled = seeded(seed, model, inputs, static, compile_config=compile_config, **mode)
        assert_same(compiled, seeded(seed, model, inputs, config, **mode))
    assert len(graphs) == 1
