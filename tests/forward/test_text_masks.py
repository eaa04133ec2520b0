"""The text's own attention mask: what the hooks make of it changes nothing, however a model is called."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask, sdpa_mask

from trim_plugin import TrimmedCache, prefill
from trim_plugin.compat import CACHE, slices_mask_rows

from ..random_models import Sample, random_inputs, random_model

EXACT = {"top_k_ratio": 1.0}
#: Nothing of it is padding.
EVEN = [Sample((1, (6,), 6)), Sample((1, (2,), 6))]


def text_of(batch, rows, padded=0):
    """Text alone; the first sample begins with padding."""
    mask = torch.ones(batch, rows, dtype=torch.long)
    mask[0, :padded] = 0
    return {
        "input_ids": torch.randint(3, 30, (batch, rows), generator=torch.Generator().manual_seed(1)),
        "attention_mask": mask,
    }


def logits(model, inputs, cache):
    with torch.no_grad():
        return model(**inputs, **{CACHE: cache}, use_cache=True).logits


def new_caches(model):
    return TrimmedCache(model, EXACT), DynamicCache(config=model.config.get_text_config())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_a_failed_forward_has_seen_is_not_the_next_ones(attention):
    """One without padding failed in the tower; the next one, of text alone, is padded."""
    model = random_model(attention=attention)
    inputs = random_inputs(model, EVEN)
    ours, stocks = new_caches(model)
    with pytest.raises(IndexError):
        logits(model, {**inputs, "aspect_ratio_ids": inputs["aspect_ratio_ids"] + 1000}, ours)
    text = text_of(*inputs["input_ids"].shape, padded=4)
    assert torch.equal(logits(model, text, ours), logits(model, text, stocks))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [0, 2])
@pytest.mark.parametrize("covers", ["new text", "all text", "more"])
def test_a_follow_ups_mask_is_read_as_stock_reads_it(attention, padded, covers):
    """Whatever it covers; of the new text alone, stock takes it for the earlier text's, and hides the new one."""
    model = random_model(attention=attention)
    first, text = random_inputs(model, EVEN), text_of(2, 5, padded)
    seen = first["cross_attention_mask"][:, -1:].expand(-1, 5, -1, -1)
    if not slices_mask_rows():  # its plain forwards take the whole text's rows
        seen = torch.cat([first["cross_attention_mask"], seen], dim=1)
    earlier, later = first["attention_mask"], torch.ones(2, 3, dtype=torch.long)
    masks = {
        "new text": [text["attention_mask"]],
        "all text": [earlier, text["attention_mask"]],
        "more": [earlier, text["attention_mask"], later],
    }
    text = {**text, "attention_mask": torch.cat(masks[covers], dim=1), "cross_attention_mask": seen}
    found = []
    for cache in new_caches(model):
        logits(model, first, cache)
        found.append(logits(model, text, cache))
    assert torch.equal(*found)


def test_attention_that_needs_a_mask_to_leave_out_free_places_is_given_one():
    """Flash attention reads whatever it is given if no mask says what is free in a static cache; here a stand-in of that kind."""
    given = []

    def mask_of(**kwargs):
        given.append(flash_attention_mask(**kwargs))
        return sdpa_mask(**kwargs)

    AttentionInterface.register("stand_in", sdpa_attention_forward)
    AttentionMaskInterface.register("stand_in", mask_of)
    try:
        model = random_model()
        model.model.language_model.set_attn_implementation("stand_in")
        inputs = random_inputs(model, EVEN)
        stocks = StaticCache(config=model.config.get_text_config(), max_cache_len=32)
        text = text_of(2, 8)
        logits(model, text, stocks)
        logits(model, inputs, TrimmedCache(model, {**EXACT, "static": True, "max_cache_len": 32}))
        logits(model, inputs, TrimmedCache(model, EXACT))
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop("stand_in")
    stock, static, dynamic = given
    assert torch.equal(stock, static)
    assert dynamic is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pictures", [1, 50])
@pytest.mark.parametrize("covered", [0, 3])
def test_text_that_a_mask_does_not_cover_is_hidden_as_stock_hides_it(attention, pictures, covered):
    model = random_model(attention=attention)
    inputs = random_inputs(model, EVEN)
    inputs["attention_mask"] = inputs["attention_mask"][:, :covered]
    ours = prefill(model, TrimmedCache(model, {**EXACT, "prefill_pictures": pictures}), **inputs, logits_to_keep=0)
    stocks = logits(model, inputs, DynamicCache(config=model.config.get_text_config()))
    torch.testing.assert_close(ours.logits, stocks, atol=1e-5, rtol=0)


def test_a_masks_row_that_stands_for_all_samples_does_so_in_pieces():
    """A picture without `cross_attention_mask`: everybody reads everything."""
    model = random_model()
    inputs = random_inputs(model, EVEN)
    del inputs["cross_attention_mask"]
    inputs["attention_mask"] = inputs["attention_mask"][:1]
    whole, pieces = (
        prefill(model, TrimmedCache(model, {**EXACT, "prefill_pictures": pictures}), **inputs).logits
        for pictures in (50, 1)
    )
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)
