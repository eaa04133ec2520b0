"""Encoded pictures: whole ones answer as the pictures themselves do; merged ones as a forward over their tokens would."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trim_plugin import KCenter, TrimConfig, TrimmedCache, encode_pictures, prefill
from trim_plugin.compat import CACHE, cache_of
from trim_plugin.embedded import ask, examples, load_small_model
from trim_plugin.forward.encoded import EncodedSample
from trim_plugin.forward.tower import visual_states
from trim_plugin.pictures.encoded import Pictures

from ..random_models import Sample, generate, largest_difference, largest_logit, random_inputs, random_model, trimmed
from .strategies import batches_with_equally_many_pictures, model_settings

QUESTION = "Read all digits."
MODES = [
    {},
    {"do_sample": True, "temperature": 1.3},
    {"do_sample": True, "num_return_sequences": 3},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2},
]
CONFIGS = [
    {"top_k_ratio": 1.0},
    {"top_k_ratio": 0.1},
    {"top_k_ratio": 0.1, "merge": False},
    {"processors": [KCenter(0.3)]},
    {"top_k_ratio": 0.2, "static": True, "static_bucket": 8},
]
PICTURE_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


def without_pixels(inputs):
    return {name: tensor for name, tensor in inputs.items() if name not in PICTURE_INPUTS}


def whole(model, inputs):
    """Every sample's pictures as the tower yields them."""
    batch = len(inputs["input_ids"])
    states = visual_states(model.model, *(inputs[name] for name in PICTURE_INPUTS), at_a_time=2)
    states = states.detach().reshape(batch, -1, states.shape[-1])
    tokens = states.shape[1]
    ones = torch.ones(tokens, dtype=torch.long)
    return [EncodedSample(own, torch.arange(tokens), ones, tokens) for own in states]


def answer(model, inputs, cache, seed=0, new=6, **mode):
    torch.manual_seed(seed)
    return generate(model, inputs, new, cache=cache, **mode)


def assert_same(ours, theirs):
    assert torch.equal(ours.sequences, theirs.sequences)
    assert largest_difference(ours, theirs) <= 1e-5 * largest_logit(theirs)
    mine, reference = cache_of(ours), cache_of(theirs)
    for name in ("kept_indices", "kept_sizes"):
        for one, other in zip(getattr(mine, name), getattr(reference, name), strict=True):
            assert torch.equal(one, other)
    one, other = (dataclasses.asdict(cache.report()) for cache in (mine, reference))
    if not mine.config.static:  # there it is as long as the test made it
        assert one["self_kv_bytes"] == other["self_kv_bytes"]
    assert one | {"self_kv_bytes": 0} == other | {"self_kv_bytes": 0}


@settings(settings.get_profile("ci"))
@given(
    model_settings,
    batches_with_equally_many_pictures,
    st.sampled_from(MODES),
    st.sampled_from(CONFIGS),
    st.sampled_from([None, 1]),
    st.integers(0, 2**16),
)
def test_whole_pictures_change_nothing(model_kwargs, samples, mode, config, at_a_time, seed):
    model = random_model(**model_kwargs)
    inputs = random_inputs(model, samples, seed)
    config = TrimConfig(**config, prefill_pictures=at_a_time)
    torch.manual_seed(seed)
    direct = trimmed(model, inputs, config, 6, **mode)
    cache = TrimmedCache(model, config, pictures=whole(model, inputs), max_cache_len=40)
    assert_same(answer(model, without_pixels(inputs), cache, seed, **mode), direct)


@pytest.mark.parametrize("kv_quantization", ["int8", "nf4"])
def test_quantized_kv(kv_quantization):
    pytest.importorskip("bitsandbytes")
    model = random_model(width=128, heads=2)
    inputs = random_inputs(model, [Sample((2, (6,), 4))])
    config = {"top_k_ratio": 0.3, "kv_quantization": kv_quantization}
    cache = TrimmedCache(model, config, pictures=whole(model, inputs))
    assert_same(answer(model, without_pixels(inputs), cache), trimmed(model, inputs, config, 6))


def test_no_tower(small):
    model, processor = small
    pictures = encode_pictures(model, processor, [examples()[0].picture], rule=KCenter(0.25))
    calls = []
    handle = model.model.vision_model.register_forward_pre_hook(lambda *_: calls.append(1))
    model.generate(**pictures.inputs(processor, QUESTION), **{CACHE: TrimmedCache(model, pictures=pictures)})
    handle.remove()
    assert calls == []


@pytest.mark.parametrize("config", CONFIGS)
def test_a_chat_about_several_pictures(small, config):
    model, processor = small
    files = [examples()[number].picture for number in (0, 3)]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": QUESTION}]}]
    pictures = encode_pictures(model, processor, files)
    inputs = pictures.inputs(processor, messages)
    from trim_plugin.pictures.prompting import build_inputs, open_picture

    full = build_inputs(processor, QUESTION, [open_picture(file) for file in files])
    for name, tensor in inputs.items():
        assert torch.equal(tensor, full[name]), name
    ours = answer(model, inputs, TrimmedCache(model, config, pictures=pictures, max_cache_len=80))
    assert_same(ours, trimmed(model, full, config, 6))


def test_merged_pictures_are_read_as_their_tokens_and_sizes_say(small):
    """A token of size n is read as n equal tokens: the same as a whole picture in which each token is its group's mean."""
    model, processor = small
    file = examples()[4].picture
    pictures = encode_pictures(model, processor, [file], rule=KCenter(0.2))
    real = pictures.tiles[0] * pictures.tile_tokens
    assert int(pictures.sizes.sum()) == real
    repeated = pictures.states.repeat_interleave(pictures.sizes, dim=0)
    spread = EncodedSample(repeated, torch.arange(real), torch.ones(real, dtype=torch.long), pictures.total)
    inputs = pictures.inputs(processor, QUESTION)
    one = answer(model, inputs, TrimmedCache(model, {"top_k_ratio": 1.0}, pictures=pictures))
    other = answer(model, inputs, TrimmedCache(model, {"top_k_ratio": 1.0}, pictures=spread))
    assert torch.equal(one.sequences, other.sequences)
    assert largest_difference(one, other) <= 1e-4
    assert cache_of(one).kept_sizes[0].tolist() == pictures.sizes.tolist()
    assert cache_of(one).report().visible_tokens == [real]


def test_dropping_leaves_what_encoded_pictures_stand_for(small):
    """A prompt's rule that forgets what it drops forgets nothing of what the kept ones stood for before."""
    model, processor = small
    pictures = encode_pictures(model, processor, [examples()[4].picture], rule=KCenter(0.5))
    inputs = pictures.inputs(processor, QUESTION)
    whole, dropped = (
        cache_of(answer(model, inputs, TrimmedCache(model, config, pictures=pictures)))
        for config in ({"top_k_ratio": 1.0}, {"top_k_ratio": 0.1, "merge": False})
    )
    sizes = dict(zip(whole.kept_indices[0].tolist(), whole.kept_sizes[0].tolist(), strict=True))
    kept = dropped.kept_indices[0].tolist()
    assert 0 < len(kept) < len(sizes)
    assert dropped.kept_sizes[0].tolist() == [sizes[token] for token in kept]
    assert max(dropped.kept_sizes[0].tolist()) > 1


def test_the_prompt_trims_further_and_sizes_multiply_through(small):
    model, processor = small
    pictures = encode_pictures(model, processor, [examples()[4].picture], rule=KCenter(0.5))
    cache = TrimmedCache(model, {"processors": [KCenter(0.2)]}, pictures=pictures)
    answer(model, pictures.inputs(processor, QUESTION), cache)
    kept, sizes = cache.kept_indices[0], cache.kept_sizes[0]
    assert len(kept) == -(-len(pictures.index) // 5)
    assert set(kept.tolist()) < set(pictures.index.tolist())
    assert int(sizes.sum()) == int(pictures.sizes.sum())


@pytest.mark.parametrize("config", CONFIGS[:4])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_a_batch_of_whole_and_merged_pictures(small, config, mode):
    """In a batch every sample is answered as alone."""
    from trim_plugin.pictures.layout import prompt_inputs

    model, processor = small
    files = [examples()[number].picture for number in range(3)]
    rules = [None, KCenter(0.25), KCenter(0.5)]
    batch = [encode_pictures(model, processor, [file], rule=rule) for file, rule in zip(files, rules, strict=True)]
    inputs = prompt_inputs(processor, [one.tiles for one in batch], ["Read all digits.", "Count the digits.", "Hi"], 4)
    config = TrimConfig(**config, prefill_pictures=1)
    together = answer(model, inputs, TrimmedCache(model, config, pictures=batch), **mode)
    copies = cache_of(together).batch_size // 3
    if "do_sample" in mode:
        return
    for sample, pictures in enumerate(batch):
        own = {name: tensor[sample : sample + 1] for name, tensor in inputs.items()}
        alone = answer(model, own, TrimmedCache(model, config, pictures=pictures), **mode)
        length = alone.sequences.shape[1]  # together, what has ended is padded until all have
        assert torch.equal(alone.sequences, together.sequences[sample : sample + 1, :length])
        assert torch.equal(cache_of(alone).kept_indices[0], cache_of(together).kept_indices[sample * copies])


@pytest.mark.parametrize("later", ["pixels", "encoded"])
@pytest.mark.parametrize("rule", [None, KCenter(0.5)])
def test_a_conversation_goes_on_with_a_new_picture(small, rule, later):
    model, processor = small
    files = [examples()[number].picture for number in (0, 4)]
    first, second = (encode_pictures(model, processor, [file], rule=rule) for file in files)
    cache = TrimmedCache(model, {"top_k_ratio": 1.0}, pictures=first)
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    output = model.generate(**first.inputs(processor, said), **{CACHE: cache}, max_new_tokens=20)
    prompt = first.inputs(processor, said)["input_ids"].shape[1]
    said.append({"role": "assistant", "content": [{"type": "text", "text": processor.decode(output[0, prompt:-1])}]})
    said.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Count the digits."}]})
    inputs = (first + second).inputs(processor, said)
    new = {}
    if later == "encoded":
        cache.show(second)
    else:
        full = ask(processor, QUESTION, files[1])
        new = {name: full[name] for name in PICTURE_INPUTS}
    told = model.generate(**inputs, **new, **{CACHE: cache}, max_new_tokens=4)
    assert told.shape[1] > inputs["input_ids"].shape[1]
    if rule is None:
        stock = ask(processor, QUESTION, files[0])
        both = {
            name: torch.cat([stock[name], ask(processor, QUESTION, files[1])[name]], dim=1) for name in PICTURE_INPUTS
        }
        exact = TrimmedCache(model, {"top_k_ratio": 1.0})
        model.generate(**stock, **{CACHE: exact}, max_new_tokens=20)
        rest = {name: tensor[:, 1:] for name, tensor in both.items()}
        assert torch.equal(told, model.generate(**inputs, **rest, **{CACHE: exact}, max_new_tokens=4))


def test_prompt_lookup(small):
    model, processor = small
    pictures = encode_pictures(model, processor, [examples()[0].picture])
    from trim_plugin.compat import slices_mask_rows

    if not slices_mask_rows():
        pytest.skip("this transformers has no assisted decoding with pictures")
    inputs = pictures.inputs(processor, QUESTION)
    plain = answer(model, inputs, TrimmedCache(model, {"top_k_ratio": 1.0}, pictures=pictures))
    looked_up = answer(
        model, inputs, TrimmedCache(model, {"top_k_ratio": 1.0}, pictures=pictures), prompt_lookup_num_tokens=2
    )
    assert torch.equal(plain.sequences, looked_up.sequences)


def test_a_loop_by_hand(small):
    model, processor = small
    pictures = encode_pictures(model, processor, [examples()[0].picture], rule=KCenter(0.25))
    inputs = pictures.inputs(processor, QUESTION)
    caches = [TrimmedCache(model, pictures=pictures) for _ in range(2)]
    with torch.no_grad():
        by_hand = model(**inputs, **{CACHE: caches[0]}, use_cache=True).logits[:, -1]
    assert float((by_hand - prefill(model, caches[1], **inputs).logits[:, -1]).abs().max()) <= 1e-5
    assert caches[0].pictures is None


def test_adapters_and_offloaded_weights(small, tmp_path):
    peft = pytest.importorskip("peft")
    accelerate = pytest.importorskip("accelerate")
    _, processor = small
    model, _ = load_small_model()
    pictures = encode_pictures(model, processor, [examples()[0].picture], rule=KCenter(0.25))
    inputs = pictures.inputs(processor, QUESTION)
    expected = answer(model, inputs, TrimmedCache(model, pictures=pictures))
    moved = accelerate.cpu_offload(load_small_model()[0], execution_device="cpu")
    assert torch.equal(expected.sequences, answer(moved, inputs, TrimmedCache(moved, pictures=pictures)).sequences)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))  # starts as if it were not there
    again = encode_pictures(adapted, processor, [examples()[0].picture], rule=KCenter(0.25))
    assert torch.equal(again.states, pictures.states)
    assert torch.equal(expected.sequences, answer(adapted, inputs, TrimmedCache(adapted, pictures=again)).sequences)


WRONG = {
    "pixels as well": (lambda inputs, full: inputs | {name: full[name] for name in PICTURE_INPUTS}, "as well"),
    "a mask for other pictures": (
        lambda inputs, full: inputs | {"cross_attention_mask": inputs["cross_attention_mask"].repeat(1, 1, 2, 1)},
        "cross_attention_mask covers 2 pictures of 4 tiles, but there are 1",
    ),
    "too many samples": (
        lambda inputs, full: {name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in inputs.items()},
        "encoded pictures of 1 samples, but input_ids has 2",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_said_before_any_work(small, change, message):
    model, processor = small
    pictures = encode_pictures(model, processor, [examples()[0].picture])
    cache = TrimmedCache(model, pictures=pictures)
    inputs = pictures.inputs(processor, QUESTION)
    calls = []
    handle = model.model.language_model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        model.generate(**change(inputs, ask(processor)), **{CACHE: cache})
    handle.remove()
    assert calls == []
    expected = model.generate(**ask(processor, QUESTION))
    assert torch.equal(expected, model.generate(**inputs, **{CACHE: cache}))


@pytest.mark.parametrize("pictures", ["page.png", [None], [torch.zeros(1)]])
def test_pictures_must_be_encoded(small, pictures):
    with pytest.raises(TypeError, match="pictures must be what encode_pictures returns"):
        TrimmedCache(small[0], pictures=pictures)
    with pytest.raises(ValueError, match="empty list"):
        TrimmedCache(small[0], pictures=[])


def test_a_plain_forward_says_what_does_not_fit(small):
    model, processor = small
    pictures = encode_pictures(model, processor, [examples()[0].picture])
    with pytest.raises(ValueError, match="of 2 samples, but the forward has 1"):
        model(
            **pictures.inputs(processor, QUESTION),
            **{CACHE: TrimmedCache(model, pictures=[pictures, pictures])},
            use_cache=True,
        )


def test_a_model_without_a_tower_is_told(small):
    from transformers import MllamaForCausalLM

    text_model = MllamaForCausalLM(small[0].config.text_config)
    pictures = encode_pictures(*small, [examples()[0].picture])
    assert isinstance(pictures, Pictures)
    with pytest.raises(ValueError, match="need an Mllama model with a vision tower"):
        TrimmedCache(text_model, pictures=pictures)
