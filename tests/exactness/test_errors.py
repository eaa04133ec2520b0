"""Every row of docs/errors.md: type and message of the error, and that model and cache are fine afterwards."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import trim_plugin
from trim_plugin import TopKPerHead, TrimmedCache
from trim_plugin.attention import masks
from trim_plugin.compat import require_supported_transformers, slices_mask_rows
from trim_plugin.forward import prefill

from ..random_models import Sample, generate, random_inputs, random_model, trimmed
from . import test_errors_of_pictures
from .conversations import Conversation

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
SAMPLES = [Sample((2, (6,), 5)), Sample((1, (2,), 3, (1, 3), 4))]


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture
def inputs(model):
    return random_inputs(model, SAMPLES)


@pytest.fixture(autouse=True)
def _the_model_generates_as_before(model):
    """Whatever a test does wrong, model and inputs give the same answers before and after."""
    given = random_inputs(model, SAMPLES, seed=9)
    stock, ours = generate(model, given), trimmed(model, given, {"top_k_ratio": 0.2})
    yield
    assert torch.equal(stock.sequences, generate(model, given).sequences)
    again = trimmed(model, given, {"top_k_ratio": 0.2})
    assert torch.equal(ours.sequences, again.sequences)
    pairs = zip(ours.past_key_values.kept_indices, again.past_key_values.kept_indices, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def forwards(model):
    """Counts how often the vision tower or the text model ran."""
    ran = []
    towers = (model.model.vision_model, model.model.language_model)
    handles = [tower.register_forward_pre_hook(lambda *_: ran.append(1)) for tower in towers]
    yield ran
    for handle in handles:
        handle.remove()


def rows_of_the_page():
    return dict(re.findall(r"^\| `([a-z-]+)` \|.*?\|\s*(.*?) \|", PAGE.read_text(encoding="utf-8"), flags=re.M))


def test_every_row_has_its_test():
    tests = [*globals(), *vars(test_errors_of_pictures)]
    names = {name.removeprefix("test_").replace("_", "-") for name in tests if name.startswith("test_")}
    rows = set(rows_of_the_page())
    assert rows
    assert rows <= names, f"rows of docs/errors.md without a test: {sorted(rows - names)}"


def before_work(forwards, error, match, call, *args, **kwargs):
    with pytest.raises(error, match=match):
        call(*args, **kwargs)
    assert forwards == [], "nothing ran"


def in_the_prefill(model, inputs, error, match, config):
    """The error comes from `generate`'s own cache, and from one given; the given one says so until it is reset."""
    with pytest.raises(error, match=match):
        trimmed(model, inputs, config)
    cache = TrimmedCache(model, config)
    with pytest.raises(error, match=match):
        generate(model, inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="left over from a forward that failed"):
        generate(model, inputs, past_key_values=cache)
    return cache


# -- settings --------------------------------------------------------------------------------------------------------


def test_unknown_field(model, inputs, forwards):
    before_work(
        forwards, ValueError, "Unknown field 'top_k'.*Allowed: top_k_ratio", trimmed, model, inputs, {"top_k": 5}
    )
    before_work(forwards, ValueError, "Unknown field 'top_k'", TrimmedCache, model, {"top_k": 5})


@pytest.mark.parametrize("ratio", [0, 0.0, -0.5, 1.5, float("nan"), float("inf"), "0.5", True, [0.5]])
def test_ratio_not_allowed(model, inputs, forwards, ratio):
    match = r"top_k_ratio must be a number in \(0, 1\], got"
    before_work(forwards, ValueError, match, trimmed, model, inputs, {"top_k_ratio": ratio})


def test_config_type(model, inputs, forwards):
    match = "cache_config of the trimmed cache must be a dict or a TrimConfig, got list"
    before_work(forwards, TypeError, match, trimmed, model, inputs, [0.5])


def test_processors_and_ratio(model, inputs, forwards):
    config = {"processors": [TopKPerHead(0.5)], "top_k_ratio": 0.5}
    before_work(forwards, ValueError, "processors and top_k_ratio are both given", trimmed, model, inputs, config)


@pytest.mark.parametrize("processors", [[], (), TopKPerHead(0.5), "topk", [TopKPerHead], ["topk"], {}])
def test_processors_not_a_list(model, inputs, forwards, processors):
    before_work(forwards, ValueError, "processors must", trimmed, model, inputs, {"processors": processors})


@pytest.mark.parametrize("field", ["kv_quantization", "self_kv_quantization"])
def test_field_not_allowed(model, inputs, forwards, field):
    before_work(forwards, ValueError, f"{field} must be one of .*, got 'int9'", trimmed, model, inputs, {field: "int9"})


@pytest.mark.parametrize("pictures", [0, -1, 1.5, "2", True])
def test_prefill_pictures(model, inputs, forwards, pictures):
    match = "prefill_pictures must be a positive integer, got"
    before_work(forwards, ValueError, match, trimmed, model, inputs, {"prefill_pictures": pictures})


def test_static_without_length(model, forwards):
    match = "A static cache needs to know how long the text can get"
    before_work(forwards, ValueError, match, TrimmedCache, model, {"static": True})


def test_no_cross_attention(forwards):
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, pad_token_id=0, eos_token_id=None, **settings)).eval()
    inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    expected = generate(llama, inputs)
    match = "needs an Mllama model .* but LlamaForCausalLM has none"
    with pytest.raises(ValueError, match=match):
        trimmed(llama, inputs, {})
    with pytest.raises(ValueError, match=match):
        TrimmedCache(llama)
    assert torch.equal(expected.sequences, generate(llama, inputs).sequences)


def test_both_caches(model, inputs, forwards):
    cache = TrimmedCache(model)
    match = "Passing both `cache_implementation`"
    before_work(forwards, ValueError, match, trimmed, model, inputs, {}, past_key_values=cache)
    generate(model, inputs, past_key_values=cache)


def test_unsupported_transformers():
    for version in ("4.57.1", "5.16.3", "6.0.0", "6.1"):
        with pytest.raises(ImportError, match=f"transformers 5.17 up to .*{re.escape(version)} is installed"):
            require_supported_transformers(version)
    for version in ("5.17.0", "5.23.0", "5.40.0.dev0"):
        require_supported_transformers(version)


# -- processors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [lambda s, v: s[..., :-1], lambda s, v: s[0], lambda s, v: s.amax(dim=1)])
def test_processor_shape(model, inputs, wrong):
    in_the_prefill(model, inputs, ValueError, "returned scores of shape .* instead of", {"processors": [wrong]})


@pytest.mark.parametrize("wrong", [lambda s, v: None, lambda s, v: s.tolist()])
def test_processor_type(model, inputs, wrong):
    in_the_prefill(model, inputs, TypeError, "instead of a tensor", {"processors": [wrong]})


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_processor_mask(model, inputs, dtype):
    def best_half(scores, visible):
        return (scores > 0.01).to(dtype)

    match = rf"best_half returned {dtype} instead of float scores. " + (
        r"It looks like a mask.* scores.masked_fill\(~mask, float\('-inf'\)\)"
        if dtype == torch.bool
        else "Return the scores"
    )
    in_the_prefill(model, inputs, TypeError, match, {"processors": [best_half]})


def test_processors_without_a_repr_are_named_by_their_class(model, inputs):
    class Forgetful:
        def __call__(self, scores, visible):
            return self.result(scores)

    wrong = Forgetful()
    for result, match in (
        (lambda scores: None, "processor Forgetful returned NoneType"),
        (lambda scores: scores > 0, "processor Forgetful returned torch.bool"),
        (
            lambda scores: torch.full_like(scores, -torch.inf),
            "processors TopKPerHead\\(0.5\\), Forgetful removed every",
        ),
    ):
        wrong.result = result
        with pytest.raises((TypeError, ValueError), match=match):
            trimmed(model, inputs, {"processors": [TopKPerHead(0.5), wrong]})
    with pytest.raises(ValueError, match="got the single Forgetful"):
        TrimmedCache(model, {"processors": wrong})


def test_processor_nan(model, inputs):
    wrong = [lambda s, v: s * float("nan")]
    cache = in_the_prefill(model, inputs, ValueError, "returned NaN", {"processors": wrong})
    cache.reset()
    with pytest.raises(ValueError, match="returned NaN"):
        generate(model, inputs, past_key_values=cache)


def test_processor_empties_a_group(model, inputs):
    match = "removed every visual token of visibility group 0 in sample 0"
    in_the_prefill(model, inputs, ValueError, match, {"processors": [lambda s, v: torch.full_like(s, -torch.inf)]})


# -- inputs ----------------------------------------------------------------------------------------------------------


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
    in_the_prefill(broken, inputs, ValueError, "attention scores of the visual tokens are NaN", {})
    inputs["pixel_values"][0, 0] = float("nan")
    cache = TrimmedCache(model)
    with pytest.raises(ValueError, match="attention scores of the visual tokens are NaN"), torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)


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
    conversation.hear(generate(model, conversation.say(Sample(((6,), 4))).inputs(), past_key_values=cache).sequences)
    conversation.say(Sample(((2,), 4)))
    past = cache.get_seq_length()
    forwards.clear()
    match = "but there are 3 of 4 \\(1 from earlier turns and 2 new: in a follow-up, pixel_values hold the new"
    before_work(forwards, ValueError, match, generate, model, conversation.inputs(), past_key_values=cache)
    assert cache.get_seq_length() == past
    generate(model, conversation.inputs(earlier_pictures=1), past_key_values=cache)


def test_mask_columns_in_a_forward(model, inputs):
    inputs["cross_attention_mask"] = inputs["cross_attention_mask"][:, :, :1]
    cache = TrimmedCache(model)
    with pytest.raises(ValueError, match=r"covers 20 visual tokens, but the pictures .* are 60"), torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="left over"):
        generate(model, inputs, past_key_values=cache)


def test_mask_reads_lost_tokens(model, forwards):
    conversation = Conversation(model)
    cache = TrimmedCache(model, {"top_k_ratio": 1.0})
    conversation.hear(
        generate(model, conversation.say(Sample(((6,), 3, (2,), 4))).inputs(), past_key_values=cache).sequences
    )
    inputs = conversation.say(Sample((4,))).inputs(earlier_pictures=2)
    wrong = dict(inputs, cross_attention_mask=inputs["cross_attention_mask"].clone())
    wrong["cross_attention_mask"][:, -2:, 0] = 1  # the first picture, which only the text before the second could read
    past = cache.get_seq_length()
    forwards.clear()
    before_work(forwards, ValueError, re.escape(masks.LOST_TOKENS), generate, model, wrong, past_key_values=cache)
    assert cache.get_seq_length() == past
    new = {name: tensor[:, past:] if name != "attention_mask" else tensor for name, tensor in wrong.items()}
    if not slices_mask_rows():
        new["cross_attention_mask"] = wrong["cross_attention_mask"]
    branch = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=re.escape(masks.LOST_TOKENS)), torch.no_grad():
        model(**new, past_key_values=branch, use_cache=True)
    with pytest.raises(ValueError, match="left over"):
        generate(model, inputs, past_key_values=branch)
    assert torch.equal(
        generate(model, conversation.inputs()).sequences, generate(model, inputs, past_key_values=cache).sequences
    )


def test_no_mask(model, inputs, monkeypatch):
    monkeypatch.setattr(prefill, "_warned_without_mask", False)
    del inputs["cross_attention_mask"]
    with pytest.warns(UserWarning, match="A picture was given without cross_attention_mask"):
        ours = trimmed(model, inputs, {"top_k_ratio": 1.0})
    everything = dict(inputs, cross_attention_mask=torch.ones(*inputs["input_ids"].shape, 3, 4, dtype=torch.long))
    assert torch.equal(generate(model, everything).sequences, ours.sequences)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trimmed(model, inputs, {"top_k_ratio": 0.2})


def test_gradient_checkpointing(model, inputs, forwards):
    text = random_inputs(model, [Sample((4,))])
    caches = [TrimmedCache(model, {"top_k_ratio": ratio}) for ratio in (0.3, 1.0)]
    model.train()
    model.gradient_checkpointing_enable()
    try:
        match = "in training mode with gradient checkpointing"
        for given in (inputs, text):
            for cache in caches:
                before_work(forwards, ValueError, match, trimmed, model, given, cache.config)
                before_work(forwards, ValueError, match, generate, model, given, past_key_values=cache)
                before_work(forwards, ValueError, match, model, **given, past_key_values=cache, use_cache=True)
        model.train(False)  # checkpointing alone changes nothing
        for cache in caches:
            generate(model, inputs, past_key_values=cache)
        model.train()
        model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 32, -100)).loss.backward()
    finally:
        model.eval()
        model.gradient_checkpointing_disable()
        model.zero_grad()


def test_flex_attention():
    from trim_plugin.attention.visibility import padding_of

    with pytest.raises(TypeError, match="cannot read padding off an attention mask of type object"):
        padding_of(object(), 3)


def test_chunked_pictures(model, inputs, forwards):
    match = "prefill_chunk_size=4 would cut a prompt with pictures into pieces"
    before_work(forwards, ValueError, match, trimmed, model, inputs, {}, prefill_chunk_size=4)


# -- caches ----------------------------------------------------------------------------------------------------------


def test_cache_of_another_model(model, inputs, forwards):
    for other in (random_model(seed=1), copy.deepcopy(model)):
        cache = TrimmedCache(other)
        forwards.clear()
        match = "made for another model"
        before_work(forwards, ValueError, match, generate, model, inputs, past_key_values=cache)
        assert generate(other, inputs, past_key_values=cache).past_key_values is cache
        with pytest.raises(ValueError, match=match), torch.no_grad():
            model(**inputs, past_key_values=TrimmedCache(other), use_cache=True)


def test_cache_of_another_batch(model, inputs, forwards):
    conversation = Conversation(model)
    cache = TrimmedCache(model)
    conversation.hear(generate(model, conversation.say(Sample(((6,), 4))).inputs(), past_key_values=cache).sequences)
    follow_up = conversation.say(Sample((3,))).inputs(earlier_pictures=1)
    past = cache.get_seq_length()
    two = {name: tensor.repeat_interleave(2, dim=0) for name, tensor in follow_up.items()}
    for given, settings in ((two, {}), (follow_up, {"num_beams": 2}), (follow_up, {"num_return_sequences": 2})):
        forwards.clear()
        settings = {"past_key_values": cache, "do_sample": "num_return_sequences" in settings, **settings}
        match = "holds 1 samples, but this generation has 2 "
        before_work(forwards, ValueError, match, generate, model, given, **settings)
    assert cache.get_seq_length() == past
    generate(model, follow_up, past_key_values=cache)


def test_cache_after_detach(model, inputs, forwards):
    cache = TrimmedCache(model)
    trim_plugin.detach(model)
    match = "hooks were removed"
    before_work(forwards, ValueError, match, generate, model, inputs, past_key_values=cache)


def test_forward_without_hooks(model, inputs):
    cache = TrimmedCache(model)
    trim_plugin.detach(model)
    with pytest.raises(RuntimeError, match="reached a model that has no trim_plugin hooks"), torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)


def test_cache_left_over(model, inputs, forwards):
    fail = [True]

    def moody(scores, visible):
        if fail[0]:
            raise ArithmeticError
        return scores

    cache = TrimmedCache(model, {"processors": [moody, TopKPerHead(0.3)]})
    with pytest.raises(ArithmeticError):
        generate(model, inputs, past_key_values=cache)
    forwards.clear()
    match = "left over from a forward that failed"
    before_work(forwards, ValueError, match, generate, model, inputs, past_key_values=cache)
    if slices_mask_rows():  # before that, transformers itself fails on rows that the mask does not have
        with pytest.raises(ValueError, match=match), torch.no_grad():
            model(**inputs, past_key_values=cache, use_cache=True)
    fail[0] = False
    cache.reset()
    ours = generate(model, inputs, past_key_values=cache)
    assert torch.equal(trimmed(model, inputs, {"top_k_ratio": 0.3}).sequences, ours.sequences)


@pytest.mark.parametrize("helper", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_continuation(model, forwards, helper):
    conversation = Conversation(model)
    cache = TrimmedCache(model)
    conversation.hear(generate(model, conversation.say(Sample(((6,), 4))).inputs(), past_key_values=cache).sequences)
    follow_up = conversation.say(Sample((3,))).inputs(earlier_pictures=1)
    forwards.clear()
    settings = {"past_key_values": cache, helper: 3 if helper == "prompt_lookup_num_tokens" else model}
    before_work(forwards, NotImplementedError, "cannot continue a cache", generate, model, follow_up, **settings)
    generate(model, follow_up, past_key_values=cache)


def test_assisted_on_a_static_cache(model, forwards):
    inputs = random_inputs(model, SAMPLES[:1])
    match = "takes rejected tokens back, which transformers' static cache layers cannot"
    config = {"static": True}
    before_work(forwards, NotImplementedError, match, trimmed, model, inputs, config, prompt_lookup_num_tokens=3)


def test_assisted_on_old_transformers(model, forwards, monkeypatch):
    from trim_plugin.generation import assisted

    monkeypatch.setattr(assisted, "slices_mask_rows", lambda: False)
    inputs = random_inputs(model, SAMPLES[:1])
    match = "cannot do assisted decoding .* with pictures on Mllama"
    before_work(forwards, NotImplementedError, match, trimmed, model, inputs, {}, prompt_lookup_num_tokens=3)


def test_reset_after_use_is_as_new(model, inputs):
    cache = TrimmedCache(model, {"top_k_ratio": 0.3})
    first = generate(model, inputs, past_key_values=cache).sequences
    cache.reset()
    assert torch.equal(first, generate(model, inputs, past_key_values=cache).sequences)


# -- training --------------------------------------------------------------------------------------------------------


def test_qlora_on_a_model_not_quantized(model, forwards):
    pytest.importorskip("trim_plugin.integrations")
    from trim_plugin.integrations.peft import lora_config, prepare_qlora

    config = lora_config("text_linear")
    before_work(forwards, ValueError, "this MllamaForC.* is not quantized", prepare_qlora, model, config)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "Example 1 has no 'answer'.*remove_unused_columns=False"),
        ({"answer": None, "question": None}, "Example 1 has no 'answer', 'question'"),
        ({"pictures": []}, "Example 1 has no picture"),
        ({"answer": " "}, "Example 1 has an empty answer"),
    ],
)
def test_example_without_answer(change, message):
    pytest.importorskip("trim_plugin.integrations")
    from trim_plugin.integrations.training import AnswerCollator

    good = {"pictures": ["a picture"], "question": "What?", "answer": "This."}
    bad = {key: value for key, value in (good | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        AnswerCollator(processor=None)([good, bad])
    with pytest.raises(ValueError, match="no examples"):
        AnswerCollator(processor=None)([])
