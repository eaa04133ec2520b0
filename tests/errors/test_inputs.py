"""The rows of docs/errors.md about inputs."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch

import trim_plugin
from trim_plugin import TrimmedCache
from trim_plugin.compat import CACHE, checkpointing_keeps_caches, slices_mask_rows
from trim_plugin.selection import visibility as masks
from trim_plugin.selection.visibility import padding_of

from ..exactness.conversations import Conversation
from ..random_models import Sample, generate, random_inputs, random_model, trimmed
from .checks import before_work, in_the_prefill

pytestmark = pytest.mark.usefixtures("generates_as_before")


def test_no_aspect_ratio_ids(model, inputs, forwards):
    del inputs["aspect_ratio_ids"]
    before_work(forwards, ValueError, "pixel_values were given without aspect_ratio_ids", trimmed, model, inputs, {})


def test_picture_shape(model, inputs, forwards):
    for wrong in (inputs["pixel_values"][:, 0], inputs["pixel_values"][:1]):
        given = dict(inputs, pixel_values=wrong)
        before_work(forwards, ValueError, "pixel_values must have the shape", trimmed, model, given, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_picture_not_finite(model, inputs, forwards, value):
    inputs["pixel_values"][1, 0, 0, 0, 0, 0] = value
    before_work(forwards, ValueError, "pixel_values hold NaN or inf", trimmed, model, inputs, {})
    stock, ours = generate(model, inputs), trimmed(model, inputs, {"top_k_ratio": 1.0})
    assert torch.equal(stock.sequences, ours.sequences), "exact mode does what stock does"


def test_scores_not_finite(model, inputs):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.language_model.layers[1].cross_attn.k_proj.weight[0, 0] = float("nan")
    in_the_prefill(broken, inputs, ValueError, "attention scores of the visual tokens are NaN", {"top_k_ratio": 0.15})
    inputs["pixel_values"][0, 0] = float("nan")
    for config, what in (({"top_k_ratio": 0.15}, "attention scores of the visual tokens"), ({}, "visual states")):
        cache = TrimmedCache(model, config)
        with pytest.raises(ValueError, match=f"{what} are NaN"), torch.no_grad():
            model(**inputs, **{CACHE: cache}, use_cache=True)


def test_attention_mask_zeros(model, inputs, forwards):
    inputs["attention_mask"][1] = 0
    before_work(forwards, ValueError, "attention_mask is 0 for every token of sample 1", trimmed, model, inputs, {})


def test_mask_shape(model, inputs, forwards):
    for wrong in (inputs["cross_attention_mask"][..., 0], inputs["cross_attention_mask"][:1]):
        given = dict(inputs, cross_attention_mask=wrong)
        before_work(forwards, ValueError, "cross_attention_mask must have the shape", trimmed, model, given, {})


def test_mask_rows(model, inputs, forwards):
    mask = inputs["cross_attention_mask"]
    for wrong in (mask[:, :3], mask[:, :-1], torch.cat([mask, mask[:, -1:]], dim=1)):
        match = f"has rows for {wrong.shape[1]} text tokens, but there are {mask.shape[1]}"
        before_work(forwards, ValueError, match, trimmed, model, dict(inputs, cross_attention_mask=wrong), {})


@pytest.mark.parametrize("change", [lambda mask: mask * 2, lambda mask: mask - 1, lambda mask: (1.0 - mask) * -1e9])
def test_mask_values(model, inputs, forwards, change):
    inputs["cross_attention_mask"] = change(inputs["cross_attention_mask"])
    before_work(forwards, ValueError, "holds values other than 0 and 1", trimmed, model, inputs, {})


def test_mask_columns(model, inputs, forwards):
    mask = inputs["cross_attention_mask"]
    for wrong in (mask[:, :, :1], mask[..., :2], torch.cat([mask, mask], dim=2)):
        match = f"covers {wrong.shape[2]} pictures of {wrong.shape[3]} tiles, but there are 3 of 4"
        before_work(forwards, ValueError, match, trimmed, model, dict(inputs, cross_attention_mask=wrong), {})
    conversation = Conversation(model)
    cache = TrimmedCache(model)
    conversation.hear(generate(model, conversation.say(Sample(((6,), 4))).inputs(), cache=cache).sequences)
    conversation.say(Sample(((2,), 4)))
    past = cache.get_seq_length()
    forwards.clear()
    match = "but there are 3 of 4 \\(1 from earlier turns and 2 new: in a follow-up, pixel_values hold the new"
    before_work(forwards, ValueError, match, generate, model, conversation.inputs(), cache=cache)
    assert cache.get_seq_length() == past
    generate(model, conversation.inputs(earlier_pictures=1), cache=cache)


def test_mask_columns_in_a_forward(model, inputs):
    inputs["cross_attention_mask"] = inputs["cross_attention_mask"][:, :, :1]
    cache = TrimmedCache(model)
    with pytest.raises(ValueError, match=r"covers 20 visual tokens, but the pictures .* are 60"), torch.no_grad():
        model(**inputs, **{CACHE: cache}, use_cache=True)
    with pytest.raises(ValueError, match="left over"):
        generate(model, inputs, cache=cache)


@pytest.mark.parametrize(
    ("first", "second", "sizes"),
    [(20, 7, "5 visual tokens, this one reads tiles of 1"), (1, 19, "1 visual tokens, this one reads tiles of 5")],
)
def test_other_tiles(model, first, second, sizes):
    """A mask of tiles cannot say of a part of one who reads it; a single token would pass for a tile."""
    cache, width = TrimmedCache(model), model.config.text_config.hidden_size

    def read(tokens, mask):
        mask = None if mask is None else torch.ones(1, mask, 1, 4, dtype=torch.long)
        states, text = torch.randn(1, tokens, width), torch.tensor([[3, 4]])
        with torch.no_grad():
            model(text, cross_attention_states=states, cross_attention_mask=mask, use_cache=True, **{CACHE: cache})

    read(first, 2 if first == 20 else None)
    with pytest.raises(ValueError, match=f"brought tiles of {sizes}"):
        read(second, 4 if second == 19 else None)


def test_mask_reads_lost_tokens(model, forwards):
    conversation = Conversation(model)
    cache = TrimmedCache(model, {"top_k_ratio": 1.0})
    conversation.hear(generate(model, conversation.say(Sample(((6,), 3, (2,), 4))).inputs(), cache=cache).sequences)
    inputs = conversation.say(Sample((4,))).inputs(earlier_pictures=2)
    wrong = dict(inputs, cross_attention_mask=inputs["cross_attention_mask"].clone())
    wrong["cross_attention_mask"][:, -2:, 0] = 1  # the first picture, which only the text before the second could read
    past = cache.get_seq_length()
    forwards.clear()
    before_work(forwards, ValueError, re.escape(masks.LOST_TOKENS), generate, model, wrong, cache=cache)
    assert cache.get_seq_length() == past
    new = {name: tensor[:, past:] if name != "attention_mask" else tensor for name, tensor in wrong.items()}
    if not slices_mask_rows():
        new["cross_attention_mask"] = wrong["cross_attention_mask"]
    branch = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=re.escape(masks.LOST_TOKENS)), torch.no_grad():
        model(**new, **{CACHE: branch}, use_cache=True)
    with pytest.raises(ValueError, match="left over"):
        generate(model, inputs, cache=branch)
    assert torch.equal(generate(model, conversation.inputs()).sequences, generate(model, inputs, cache=cache).sequences)


def test_no_mask(model, inputs, monkeypatch):
    monkeypatch.setattr(masks, "_warned_without_mask", False)
    del inputs["cross_attention_mask"]
    with pytest.warns(UserWarning, match="A picture was given without cross_attention_mask"):
        ours = trimmed(model, inputs, {"top_k_ratio": 1.0})
    everything = dict(inputs, cross_attention_mask=torch.ones(*inputs["input_ids"].shape, 3, 4, dtype=torch.long))
    assert torch.equal(generate(model, everything).sequences, ours.sequences)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trimmed(model, inputs, {"top_k_ratio": 0.2})


def checkpointing(model, what):
    """Enable or disable it, by the name that this transformers has for it: 5.23 has deprecated the former one."""
    names = (f"{kind}_checkpointing_{what}" for kind in ("activation", "gradient"))
    next(getattr(model, name) for name in names if hasattr(model, name))()


def test_gradient_checkpointing(model, inputs, forwards):
    text = random_inputs(model, [Sample((4,))])
    caches = [TrimmedCache(model, {"top_k_ratio": ratio}) for ratio in (0.3, 1.0)]
    expected = {
        (given is text, cache.config.exact): trimmed(model, given, cache.config).sequences
        for given in (inputs, text)
        for cache in caches
    }
    forwards.clear()
    model.train()
    checkpointing(model, "enable")
    try:
        match = "in training mode with gradient checkpointing"
        for given in (inputs, text):
            for cache in caches:
                before_work(forwards, ValueError, match, model, **given, **{CACHE: cache}, use_cache=True)
                if checkpointing_keeps_caches():  # where no gradients are computed
                    assert torch.equal(
                        trimmed(model, given, cache.config).sequences, expected[given is text, cache.config.exact]
                    )
                    forwards.clear()
                else:
                    before_work(forwards, ValueError, match, trimmed, model, given, cache.config)
                    before_work(forwards, ValueError, match, generate, model, given, cache=cache)
        model.train(False)  # checkpointing alone changes nothing
        for cache in caches:
            generate(model, inputs, cache=cache)
        model.train()
        model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 32, -100)).loss.backward()
    finally:
        model.eval()
        checkpointing(model, "disable")
        model.zero_grad()


def test_flex_attention(model, inputs, forwards):
    text, cache = random_inputs(model, [Sample((4,))]), TrimmedCache(model)
    match = r"does not work with attn_implementation='flex_attention'.*model.set_attn_implementation\(\"sdpa\"\)"
    model.set_attn_implementation("flex_attention")
    try:
        for given in (inputs, text):
            forwards.clear()
            for config in ({}, {"top_k_ratio": 1.0}):
                before_work(forwards, ValueError, match, trimmed, model, given, config)
            before_work(forwards, ValueError, match, generate, model, given, cache=cache)
            before_work(forwards, ValueError, match, model, **given, **{CACHE: cache}, use_cache=True)
            assert cache.turn is None
    finally:
        model.set_attn_implementation("sdpa")
    generate(model, inputs, cache=cache)
    with pytest.raises(TypeError, match="cannot read padding off an attention mask of type object"):
        padding_of(object(), 0, 3)


def test_prefix_tuning(inputs):
    peft = pytest.importorskip("peft")
    base = random_model()
    expected = trimmed(base, inputs, {}).sequences
    ran, cache = [], TrimmedCache(base)
    for tower in (base.model.vision_model, base.model.language_model):
        tower.register_forward_pre_hook(lambda *_: ran.append(1))
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(base, config).eval()
    match = "active prefix-tuning adapter, which is itself a cache"
    for settings in ({"cache_implementation": "trimmed"}, {"cache": cache}):
        before_work(ran, ValueError, match, generate, model, inputs, **settings)
    before_work(ran, ValueError, match, TrimmedCache, model)
    before_work(ran, ValueError, match, trim_plugin.prefill, model, cache, **inputs)
    with model.disable_adapter():
        assert torch.equal(trimmed(model, inputs, {}).sequences, expected)
        assert torch.equal(generate(model, inputs, cache=TrimmedCache(model)).sequences, expected)


def test_chunked_pictures(model, inputs, forwards):
    match = "prefill_chunk_size=4 would cut a prompt with pictures into pieces"
    before_work(forwards, ValueError, match, trimmed, model, inputs, {}, prefill_chunk_size=4)
