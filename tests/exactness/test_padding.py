"""Padding never counts, wherever it stands: before, after or between the turns of a text, in all samples or in some."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, MllamaForCausalLM
from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask

from trim_plugin import KCenter, TrimmedCache
from trim_plugin.compat import CACHE, cache_of

from ..random_models import PAD, Sample, generate, largest_difference, random_inputs, random_model, trimmed
from ..reference_rule import check_kept
from .restatement import Restatement
from .rules import top_k
from .strategies import batches_with_pictures, mixed_batches, model_settings

usual = settings.get_profile("ci")
few = settings(usual, max_examples=usual.max_examples // 2)
#: What padding's rows of `cross_attention_mask` hold: nothing, what the text before them reads, or everything.
FILLERS = ("blind", "last", "all")
TEXT_INPUTS = ("input_ids", "attention_mask", "cross_attention_mask")
#: How many of the whole text's rows, and how many pictures, there are after each turn of `CONVERSATION`.
ENDS, PICTURES = (7, 13, 17), (1, 2, 2)
CONVERSATION = [Sample((2, (6,), 4, (5,), 9)), Sample((2, (2,), 4, (6,), 9))]


@dataclasses.dataclass
class Talk:
    """Inputs of a whole conversation, and the row before which each turn ends."""

    inputs: dict[str, torch.Tensor]
    ends: list[int]

    @property
    def rows(self):
        return [slice(start, end) for start, end in itertools.pairwise([0, *self.ends])]


def padded(inputs, pads, ends=None, filler="last"):
    """The same samples with other padding.

    `pads[turn][sample]` is the number of padding rows after the sample's text of that turn; what a turn's longest sample has more
    stands before the text.
    """
    ends = ends or [inputs["input_ids"].shape[1]]
    turns, batch = list(itertools.pairwise([0, *ends])), len(inputs["input_ids"])
    text = [
        [inputs["attention_mask"][i, start:end].nonzero()[:, 0] + start for i in range(batch)] for start, end in turns
    ]
    widths = [max(len(text[t][i]) + pads[t][i] for i in range(batch)) for t in range(len(turns))]
    out = {name: tensor for name, tensor in inputs.items() if name not in TEXT_INPUTS}
    for name in set(TEXT_INPUTS) & set(inputs):
        old, fill = inputs[name], PAD if name == "input_ids" else 0
        if name == "cross_attention_mask" and filler == "all":
            fill = 1
        new = old.new_full((batch, sum(widths), *old.shape[2:]), fill)
        for turn, sample in itertools.product(range(len(turns)), range(batch)):
            rows, after = text[turn][sample], pads[turn][sample]
            end = sum(widths[: turn + 1])
            new[sample, end - after - len(rows) : end - after] = old[sample, rows]
            if name == "cross_attention_mask" and filler == "last" and len(rows):
                new[sample, end - after : end] = old[sample, rows[-1]]
        out[name] = new
    return Talk(out, list(itertools.accumulate(widths)))


def play(model, cache, talk, pictures):
    """Plain forwards, one for each turn; yields the logits of its text rows."""
    whole, seen = talk.inputs, 0
    positions = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for rows, count in zip(talk.rows, pictures, strict=True):
        new = {name: whole[name][:, seen:count] for name in set(whole) - set(TEXT_INPUTS)} if count > seen else {}
        seen = count
        with torch.no_grad():
            logits = model(
                input_ids=whole["input_ids"][:, rows],
                attention_mask=whole["attention_mask"][:, : rows.stop],
                cross_attention_mask=whole["cross_attention_mask"][:, : rows.stop, :count],
                position_ids=positions[:, rows],
                **{CACHE: cache},
                use_cache=True,
                **new,
            ).logits
        yield logits[whole["attention_mask"][:, rows].bool()]


def kept_of(cache):
    return [indices.tolist() for indices in cache.kept_indices], [sizes.tolist() for sizes in cache.kept_sizes]


def pads_of(data, batch, turns=1):
    return [[data.draw(st.integers(0, 4)) for _ in range(batch)] for _ in range(turns)]


@few
@given(
    model_settings,
    mixed_batches,
    st.integers(0, 99),
    st.sampled_from([0.05, 0.2, 0.5]),
    st.sampled_from(FILLERS),
    st.data(),
)
def test_kept_tokens_do_not_depend_on_padding(model_kwargs, samples, seed, ratio, filler, data):
    model = random_model(**model_kwargs)
    inputs = random_inputs(model, samples, seed)
    moved = padded(inputs, pads_of(data, len(samples)), filler=filler).inputs
    caches = [cache_of(trimmed(model, given_inputs, {"top_k_ratio": ratio}, 1)) for given_inputs in (inputs, moved)]
    assert kept_of(caches[0]) == kept_of(caches[1])
    if "pixel_values" in inputs:
        check_kept(caches[1].kept_indices, model, moved, ratio)
        assert caches[0].report().visible_tokens == caches[1].report().visible_tokens


@few
@given(model_settings, mixed_batches, st.integers(0, 99), st.sampled_from(FILLERS), st.data())
def test_exact_equals_stock_whatever_is_padding(model_kwargs, samples, seed, filler, data):
    """Stock goes on from the last row, text or not, and so does exact mode."""
    model = random_model(**model_kwargs)
    inputs = padded(random_inputs(model, samples, seed), pads_of(data, len(samples)), filler=filler).inputs
    stock, ours = generate(model, inputs, 5), trimmed(model, inputs, {"top_k_ratio": 1.0}, 5)
    assert torch.equal(stock.sequences, ours.sequences)
    assert largest_difference(stock, ours) <= 1e-5


@settings(few, max_examples=few.max_examples // 2)
@given(batches_with_pictures, st.integers(0, 99), st.booleans(), st.sampled_from(FILLERS), st.data())
def test_trimmed_text_is_the_restatements_whatever_is_padding(samples, seed, merge, filler, data):
    model = random_model(seed=seed, image_size=16)
    inputs = padded(random_inputs(model, samples, seed), pads_of(data, len(samples)), filler=filler).inputs
    restated = Restatement(model, inputs, top_k(0.2), merge)
    expected = restated.generate(4)
    ours = trimmed(model, inputs, {"top_k_ratio": 0.2, "merge": merge}, 4)
    assert restated.kept == [kept.tolist() for kept in cache_of(ours).kept_indices]
    assert restated.sizes == [sizes.tolist() for sizes in cache_of(ours).kept_sizes]
    assert torch.equal(expected.sequences, ours.sequences)


@settings(few, max_examples=few.max_examples // 2)
@given(st.integers(0, 99), st.booleans(), st.sampled_from(FILLERS), st.booleans(), st.data())
def test_a_conversation_keeps_and_says_the_same_wherever_its_turns_are_padded(seed, merge, filler, side_by_side, data):
    """The second turn brings a picture, the third reads; every turn's text rows have the logits that they have unpadded."""
    model = random_model(seed=seed)
    inputs = random_inputs(model, CONVERSATION, seed)
    if side_by_side:  # later text goes on reading the first picture
        inputs["cross_attention_mask"] = inputs["cross_attention_mask"].cummax(dim=1).values
    talks = [Talk(inputs, list(ENDS)), padded(inputs, pads_of(data, 2, 3), ENDS, filler)]
    caches = [TrimmedCache(model, {"top_k_ratio": 0.2, "merge": merge}) for _ in talks]
    plays = [play(model, cache, talk, PICTURES) for cache, talk in zip(caches, talks, strict=True)]
    for bare, moved in zip(*plays, strict=True):
        assert kept_of(caches[0]) == kept_of(caches[1])
        torch.testing.assert_close(bare, moved, rtol=0, atol=1e-4)


@settings(few, max_examples=few.max_examples // 2)
@given(st.integers(0, 99), st.sampled_from(["blind", "last"]), st.data())
def test_an_exact_conversation_is_stocks_wherever_its_turns_are_padded(seed, filler, data):
    model = random_model(seed=seed)
    inputs = random_inputs(model, CONVERSATION, seed)
    inputs["cross_attention_mask"] = inputs["cross_attention_mask"].cummax(dim=1).values
    talk = padded(inputs, pads_of(data, 2, 3), ENDS, filler)
    caches = DynamicCache(config=model.config.text_config), TrimmedCache(model, {"top_k_ratio": 1.0})
    for stock, ours in zip(*(play(model, cache, talk, PICTURES) for cache in caches), strict=True):
        torch.testing.assert_close(stock, ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "how"),
    [
        ({}, {}),
        ({"prefill_pictures": 1}, {}),
        ({"static": True, "static_bucket": 4}, {"disable_compile": True}),
        ({"static": True, "prefill_pictures": 1}, {"disable_compile": True}),
        ({"kv_quantization": "int8"}, {}),
        ({"processors": [KCenter(0.3)]}, {}),
        ({"tower_share": 0.7}, {}),
        ({}, {"num_beams": 2}),
        ({}, {"do_sample": True, "num_return_sequences": 2}),
    ],
)
@pytest.mark.parametrize("pads", [(3, 3), (0, 3)], ids=["every row", "one row"])
def test_every_way_of_reading_a_prompt_knows_padding_at_its_end(config, how, pads):
    if "kv_quantization" in config:
        pytest.importorskip("bitsandbytes")
    model = random_model(seed=5, vision_width=64, width=64)
    inputs = random_inputs(model, [Sample((2, (6,), 3, (2,), 5)), Sample(((5,), 4, (1,), 2))])
    moved = padded(inputs, [pads]).inputs
    config = config if "processors" in config else {"top_k_ratio": 0.2, **config}
    bare, ours = (cache_of(trimmed(model, one, config, 2, **how)) for one in (inputs, moved))
    assert kept_of(bare) == kept_of(ours)


def masks_by_hand(flat, past=0):
    """The masks of text with padding as one makes them for the layers."""
    keys = flat.bool()
    causal = (torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool).tril() & keys[:, None])[:, None, past:]
    additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    return {"bool": causal, "additive": additive}


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("pads", [(2, 2), (0, 3)])
def test_masks_that_the_caller_made(model, kind, pads):
    inputs = random_inputs(model, CONVERSATION)
    caches = []
    for given_inputs in (inputs, padded(inputs, [pads]).inputs):
        cache = TrimmedCache(model, {"top_k_ratio": 0.2})
        attention_mask = masks_by_hand(given_inputs["attention_mask"])[kind]
        with torch.no_grad():
            model(**{**given_inputs, "attention_mask": attention_mask}, **{CACHE: cache}, use_cache=True)
        caches.append(cache)
    assert kept_of(caches[0]) == kept_of(caches[1])


@pytest.mark.parametrize("pads", [(2, 2), (0, 3)])
def test_text_models_called_by_themselves(model, pads):
    """As `MllamaForCausalLM`, and as the inner model with arguments by position: both bring masks of their own."""
    whole = random_inputs(model, CONVERSATION)
    with torch.no_grad():
        states = model.model.vision_model(
            **{name: whole[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        ).last_hidden_state
        states = model.model.multi_modal_projector(states).flatten(0, 2)
    causal = MllamaForCausalLM(model.config.text_config)
    causal.model, causal.lm_head = model.model.language_model, model.lm_head
    expected = kept_of(cache_of(trimmed(model, whole, {"top_k_ratio": 0.2}, 1)))
    moved = padded(whole, [pads]).inputs
    mask, open_rows = _prepare_cross_attention_mask(
        moved["cross_attention_mask"], model.model.vision_model.num_patches, torch.float32
    )
    rest = {"cross_attention_states": states, "cross_attention_mask": mask, "full_text_row_masked_out_mask": open_rows}
    for call in (
        lambda ids, seen, **rest: causal(input_ids=ids, attention_mask=seen, **rest),
        lambda ids, seen, **rest: causal.model(ids, seen, **rest),
    ):
        cache = TrimmedCache(causal, {"top_k_ratio": 0.2})
        with torch.no_grad():
            call(moved["input_ids"], moved["attention_mask"], **rest, **{CACHE: cache}, use_cache=True)
        assert kept_of(cache) == expected


def test_padding_may_read_what_is_gone(model):
    """Its rows of the mask are nobody's: no reason to refuse a turn, in `generate` either."""
    inputs = random_inputs(model, CONVERSATION)
    talk = padded(inputs, [[1, 1], [2, 2], [2, 2]], ENDS, "all")
    cache = TrimmedCache(model, {"top_k_ratio": 0.2})
    turns = play(model, cache, talk, PICTURES)
    next(turns)
    next(turns)
    kept = kept_of(cache)
    third = {name: talk.inputs[name] for name in TEXT_INPUTS}
    generate(model, third, 2, **{CACHE: copy.deepcopy(cache)})
    text = third["attention_mask"][:, -3:-2].bool()
    assert bool(text.all())
    third["cross_attention_mask"][:, -3, 0] = 1
    with pytest.raises(ValueError, match="has dropped them"):
        generate(model, third, 2, **{CACHE: cache})
    assert kept_of(cache) == kept
