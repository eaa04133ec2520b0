"""What a prefill leaves behind where tokens were merged, and where there was nothing to merge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trim_plugin import KCenter, TopPPerHead, TrimmedCache
from trim_plugin.compat import CACHE, cache_of, slices_mask_rows
from trim_plugin.forward import turn

from ..exactness.conversations import Conversation
from ..exactness.strategies import mixed_batches, model_settings
from ..random_models import Sample, generate, random_inputs, random_model, trimmed

RULES = [{"top_k_ratio": 0.1}, {"processors": [TopPPerHead(0.4)]}, {"processors": [KCenter(0.3)]}]


def keep_all(scores, visible):
    return scores


@pytest.mark.parametrize(
    "config", [{"top_k_ratio": 1.0}, {"processors": [keep_all]}, {"processors": [TopPPerHead(1.0)]}]
)
@pytest.mark.parametrize("parts", [(1, (6,), 4), (1, (2, 5), 4), (1, (6,), 2, (3,), 4)])
def test_where_everything_visible_is_kept_nothing_is_merged_and_decoding_gets_no_mask(config, parts):
    model = random_model(seed=1, kv_heads=4, image_size=16)
    inputs = random_inputs(model, [Sample(parts)])
    ours = trimmed(model, inputs, config)
    exact = trimmed(model, inputs, {"top_k_ratio": 1.0})
    cache, reference = cache_of(ours), cache_of(exact)
    assert torch.equal(cache.kept_indices[0], reference.kept_indices[0])
    assert torch.equal(cache.kept_sizes[0], torch.ones_like(cache.kept_indices[0]))
    assert [own.mask for own in cache.kept.classes] == [None]
    assert torch.equal(ours.sequences, exact.sequences)
    for index in cache.cross_layers:
        for kind in ("keys", "values"):
            held = getattr(cache.layers[index], kind)
            assert held.is_contiguous(), "decoding reads head by head"
            torch.testing.assert_close(held, getattr(reference.layers[index], kind), rtol=0, atol=1e-6)


@given(model_settings, mixed_batches, st.integers(0, 99), st.sampled_from(RULES), st.booleans())
def test_sizes_add_up_to_what_the_last_row_may_read(model_kwargs, samples, seed, config, pad_rows_see):
    """No visual token is forgotten: every one that may be read is part of exactly one kept token, of its own picture's run."""
    model = random_model(**model_kwargs)
    inputs = random_inputs(model, samples, seed, pad_rows_see)
    cache = cache_of(trimmed(model, inputs, config, 2))
    dropped = cache_of(trimmed(model, inputs, {**config, "merge": False}, 2))
    for sample, (kept, sizes) in enumerate(zip(cache.kept_indices, cache.kept_sizes, strict=True)):
        assert torch.equal(kept, dropped.kept_indices[sample])
        assert bool((dropped.kept_sizes[sample] == 1).all())
        if "pixel_values" not in inputs:
            assert len(kept) == len(sizes) == 0
            continue
        tiles = inputs["cross_attention_mask"][sample]
        readable = tiles[-1].flatten().bool().repeat_interleave(cache.report().total_tokens[0] // tiles[0].numel())
        if not readable.any():  # a sample without a picture keeps every token of the others' empty ones
            assert bool((sizes == 1).all())
            assert len(kept) == cache.report().total_tokens[0]
            continue
        assert int(sizes.sum()) == int(readable.sum())
        for run in runs_of(tiles, inputs["attention_mask"][sample].bool()):
            members = run.repeat_interleave(cache.report().total_tokens[0] // len(run)) & readable
            assert int(sizes[members[kept]].sum()) == int(members.sum())


def runs_of(tiles, text):
    """Tiles, bool (all tiles of a sample,), that the same text rows read."""
    columns = tiles[text].flatten(1).T
    patterns = columns.unique(dim=0)
    return [(columns == pattern).all(dim=1) for pattern in patterns if pattern.any()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [{"top_k_ratio": 0.05}, {"processors": [KCenter(0.05)]}])
def test_half_precision_means_lose_one_rounding(dtype, config):
    """The first cross-attention layer's merged keys and values against float64 means of stock's."""
    model = random_model(seed=4, image_size=16).to(dtype)
    inputs = random_inputs(model, [Sample((1, (6,), 5))])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        stock = cache_of(model(**inputs, use_cache=True)).layers[1]
    cache = cache_of(trimmed(model, inputs, config, 1))
    kept, sizes = cache.kept_indices[0], cache.kept_sizes[0]
    assert int(sizes.max()) > 5
    unit = torch.nn.functional.normalize(stock.keys[0].transpose(0, 1).flatten(1).double(), dim=-1)
    joins = (unit @ unit[kept].T).argmax(dim=1)
    joins[kept] = torch.arange(len(kept))
    assert torch.bincount(joins, minlength=len(kept)).tolist() == sizes.tolist()
    for kind in ("keys", "values"):
        whole = getattr(stock, kind)[0].double()
        means = torch.stack([whole[:, joins == slot].mean(dim=1) for slot in range(len(kept))], dim=1)
        held = getattr(cache.layers[1], kind)[0].double()
        # Half a unit in the last place is the cast's, next to none the sum's.
        assert bool(((held - means).abs() <= 0.51 * torch.finfo(dtype).eps * means.abs() + 1e-6).all())
    (own,) = cache.kept.classes
    assert own.mask.dtype == dtype
    torch.testing.assert_close(own.mask.flatten().float(), sizes.float().log(), rtol=4e-3, atol=0)


@pytest.mark.parametrize(
    "config", [{"top_k_ratio": 0.2}, {"processors": [KCenter(0.2)]}, {"processors": [KCenter(radius=0.3)]}]
)
def test_a_forward_may_record_gradients_or_infer(config):
    """Stock's forward does; what is chosen has no gradient, what is read has."""
    model = random_model(seed=2, image_size=16)
    inputs = random_inputs(model, [Sample((1, (6,), 4)), Sample((1, (2,), 3))])
    found = []
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        cache = TrimmedCache(model, config)
        with context():
            logits = model(**inputs, **{CACHE: cache}, use_cache=True).logits
        found.append((logits, cache))
        torch.testing.assert_close(logits.detach(), found[0][0], rtol=0, atol=1e-5)
        assert [sizes.tolist() for sizes in cache.kept_sizes] == [sizes.tolist() for sizes in found[0][1].kept_sizes]
        assert all(not sizes.requires_grad for sizes in cache.kept_sizes)
    logits.float().sum().backward()
    crossing = model.model.language_model.layers[3].cross_attn
    assert crossing.k_proj.weight.grad.abs().sum() > 0


def test_votes_on_a_later_picture_reckon_with_what_earlier_tokens_stand_for(monkeypatch):
    """Text that reads both pictures has less attention left for the second, the more the first one's tokens stand for."""
    model, given_sizes = random_model(seed=3, image_size=16), []
    score = turn.visual_token_scores
    monkeypatch.setattr(turn, "visual_token_scores", lambda *args: given_sizes.append(args[5]) or score(*args))
    cache, conversation = TrimmedCache(model, {"top_k_ratio": 0.1}), Conversation(model)
    heard = generate(model, conversation.say(Sample(((6,), 4))).inputs(), 2, cache=cache).sequences
    sizes = cache.kept_sizes[0]
    inputs = conversation.hear(heard).say(Sample(((2,), 4))).inputs(1)
    inputs["cross_attention_mask"] = inputs["cross_attention_mask"].cummax(dim=1).values
    generate(model, inputs, 2, cache=cache)
    assert given_sizes[0] is None
    assert int(sizes.max()) > 1
    expected = torch.cat([sizes.float().log(), torch.zeros(4 * 17)])
    torch.testing.assert_close(given_sizes[1], expected[None])


def test_text_without_a_mask_reads_the_sizes_as_text_with_an_open_mask_does():
    model = random_model(seed=3, image_size=16)
    inputs, logits = random_inputs(model, [Sample((1, (6,), 4)), Sample((1, (2,), 4))]), []
    text = torch.arange(8).view(2, 4) + 3
    everything = inputs["cross_attention_mask"][:, -1:].expand(-1, 4, -1, -1)
    for mask in (None, everything):
        cache = TrimmedCache(model, {"top_k_ratio": 0.1})
        with torch.no_grad():
            model(**inputs, **{CACHE: cache}, use_cache=True)
            ones = torch.ones(2, inputs["input_ids"].shape[1] + 4, dtype=torch.long)
            if mask is not None and not slices_mask_rows():  # there the model takes the new rows out itself
                mask = torch.cat([inputs["cross_attention_mask"], mask], dim=1)
            given = {"input_ids": text, "attention_mask": ones, "cross_attention_mask": mask}
            logits.append(model(**given, **{CACHE: cache}, use_cache=True).logits)
        assert int(cache.kept_sizes[0].max()) > 1
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
