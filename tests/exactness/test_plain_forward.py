"""A `TrimmedCache` in plain forwards and in a decoding loop written by hand."""

from __future__ import annotations

import pytest
import torch

from trim_plugin import TrimConfig, TrimmedCache
from trim_plugin.compat import CACHE, cache_of

from ..random_models import Sample, generate, random_inputs, random_model, trimmed

SAMPLES = [Sample((2, (6,), 5)), Sample((1, (2,), 3, (1, 3), 4))]


def decode_by_hand(model, inputs, cache, new, keep_mask):
    """Greedy decoding as one writes it by hand; `keep_mask`: pass the grown cross_attention_mask, or none after the prompt."""
    inputs = dict(inputs)
    attention_mask, cross_mask = inputs.pop("attention_mask"), inputs.pop("cross_attention_mask")
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        output = model(
            **inputs,
            attention_mask=attention_mask,
            cross_attention_mask=cross_mask,
            position_ids=positions,
            **{CACHE: cache},
            use_cache=True,
        )
        sequences, logits = [inputs["input_ids"]], []
        for _ in range(new):
            logits.append(output.logits[:, -1])
            token = output.logits[:, -1:].argmax(-1)
            sequences.append(token)
            attention_mask = torch.cat([attention_mask, torch.ones_like(token)], dim=1)
            cross_mask = torch.cat([cross_mask, cross_mask[:, -1:]], dim=1)
            positions = positions[:, -1:] + 1
            output = model(
                input_ids=token,
                attention_mask=attention_mask,
                cross_attention_mask=cross_mask if keep_mask else None,
                position_ids=positions,
                **{CACHE: cache},
                use_cache=True,
            )
    return torch.cat(sequences, dim=1), logits


@pytest.mark.parametrize("keep_mask", [True, False])
@pytest.mark.parametrize("ratio", [1.0, 0.2])
def test_loop_by_hand_equals_generate(ratio, keep_mask):
    model = random_model(seed=1)
    inputs = random_inputs(model, SAMPLES)
    cache = TrimmedCache(model, TrimConfig(top_k_ratio=ratio))
    sequences, logits = decode_by_hand(model, inputs, cache, 8, keep_mask)
    expected = trimmed(model, inputs, {"top_k_ratio": ratio})
    assert torch.equal(expected.sequences, sequences)
    assert max(float((a - b).abs().max()) for a, b in zip(expected.logits, logits, strict=True)) <= 1e-5
    for mine, theirs in zip(cache.kept_indices, cache_of(expected).kept_indices, strict=True):
        assert torch.equal(mine, theirs)


def test_prefill_logits_of_exact_mode_equal_stock():
    model = random_model(seed=2)
    inputs = random_inputs(model, SAMPLES)
    with torch.no_grad():
        stock = model(**inputs, use_cache=True).logits
        ours = model(**inputs, **{CACHE: TrimmedCache(model, {"top_k_ratio": 1.0})}, use_cache=True).logits
    text = inputs["attention_mask"].bool()
    assert float((stock - ours)[text].abs().max()) <= 1e-5


def test_generate_goes_on_from_a_plain_forward():
    model = random_model(seed=3)
    inputs = random_inputs(model, SAMPLES)
    cache = TrimmedCache(model, {"top_k_ratio": 1.0})
    head = {
        name: tensor[:, :-2] if name in ("input_ids", "attention_mask", "cross_attention_mask") else tensor
        for name, tensor in inputs.items()
    }
    head["position_ids"] = (head["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(**head, **{CACHE: cache}, use_cache=True)
    rest = {name: inputs[name] for name in ("input_ids", "attention_mask", "cross_attention_mask")}
    ours = generate(model, rest, cache=cache)
    assert torch.equal(generate(model, inputs).sequences, ours.sequences)


def test_inputs_embeds():
    model = random_model(seed=3)
    inputs = random_inputs(model, SAMPLES)
    embedded = dict(inputs)
    embedded["inputs_embeds"] = model.get_input_embeddings()(embedded.pop("input_ids")).detach()
    stock = generate(model, embedded)
    ours = trimmed(model, embedded, {"top_k_ratio": 1.0})
    assert torch.equal(stock.sequences, ours.sequences)


def test_cross_attention_states_given():
    """The vision tower may run elsewhere: its projected states can be given instead of pictures."""
    model = random_model(seed=3)
    inputs = random_inputs(model, SAMPLES)
    with torch.no_grad():
        states = model.model.vision_model(
            pixel_values=inputs["pixel_values"],
            aspect_ratio_ids=inputs["aspect_ratio_ids"],
            aspect_ratio_mask=inputs["aspect_ratio_mask"],
        ).last_hidden_state
        states = model.model.multi_modal_projector(states).flatten(0, 2)
        text = {name: inputs[name] for name in ("input_ids", "attention_mask", "cross_attention_mask")}
        cache = TrimmedCache(model, {"top_k_ratio": 0.2})
        ours = model(**text, cross_attention_states=states, **{CACHE: cache}, use_cache=True)
    whole = TrimmedCache(model, {"top_k_ratio": 0.2})
    with torch.no_grad():
        expected = model(**inputs, **{CACHE: whole}, use_cache=True)
    assert torch.allclose(ours.logits, expected.logits, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(cache.kept_indices, whole.kept_indices, strict=True))
