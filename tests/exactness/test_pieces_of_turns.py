"""Pieces of a turn: how many text rows they have is known however they are given, and one that chose too little is read again."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from trim_plugin import KCenter, TrimmedCache, encode_pictures, prefill
from trim_plugin.compat import cache_of, slices_mask_rows
from trim_plugin.embedded import examples, load_small_model

from ..random_models import Sample, generate, largest_difference, largest_logit, random_inputs, random_model, trimmed

BATCH = [Sample((1, (6,), 6)), Sample((2, (1,), 3)), Sample((3,)), Sample((1, (2,), 2, (1,), 4))]
#: Rows of the first turn, which has one picture; the second one has more of them, and another picture.
FIRST = 4


@pytest.mark.parametrize("config", [{"top_k_ratio": 1.0}, {"top_k_ratio": 0.3}, {"processors": [KCenter(0.3)]}])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}])
def test_embedded_prompts(config, mode):
    """`generate` then has ids of no token at all."""
    model = random_model(seed=3)
    inputs = random_inputs(model, BATCH)
    expected = trimmed(model, inputs, config, new=4, **mode)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    for pictures in (1, 2):
        ours = trimmed(model, inputs, {**config, "prefill_pictures": pictures}, new=4, **mode)
        assert torch.equal(ours.sequences, expected.sequences[:, -4:])
        assert largest_difference(ours, expected) <= 1e-5


def long_follow_up(padded):
    """A first turn, and the inputs of a second one that is longer, in which a sample may begin with padding."""
    samples = [Sample((1, (2,), FIRST - 2, 2, (3,), 6))] * 2
    model = random_model(seed=5)
    whole = random_inputs(model, samples)
    if padded:
        whole["attention_mask"][1, FIRST : FIRST + 2] = 0
    images = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    texts = ("input_ids", "attention_mask", "cross_attention_mask")
    first = {name: whole[name][:, :FIRST] for name in texts} | {name: whole[name][:, :1] for name in images}
    first["cross_attention_mask"] = first["cross_attention_mask"][:, :, :1]
    second = {**whole, **{name: whole[name][:, 1:] for name in images}}
    return model, first, {**second, "input_ids": whole["input_ids"][:, FIRST:]}


@pytest.mark.parametrize("config", [{"top_k_ratio": 1.0}, {"top_k_ratio": 0.3}, {"processors": [KCenter(0.3)]}])
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_follow_ups_that_are_longer_than_what_is_held(config, by_hand, padded):
    """Only their new tokens are given."""
    model, first, second = long_follow_up(padded)
    kept, found = [], []
    for pieces in ({}, {"prefill_pictures": 1}):
        cache = TrimmedCache(model, config | pieces)
        prefill(model, cache, **first)
        if by_hand:
            found.append(prefill(model, cache, **second).logits[:, -1])
        else:
            found.append(generate(model, second, 1, cache=cache).logits[0])
        kept.append(cache.kept_indices)
    assert float((found[0] - found[1]).abs().max()) <= 1e-5
    assert all(map(torch.equal, *kept))


@pytest.mark.parametrize("config", [{}, {"tower_share": 0.6}])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2, "num_return_sequences": 2}])
def test_what_was_chosen_too_hastily_is_chosen_again(config, mode):
    """Choices that did not ask whether they are done, in every second call that may not."""
    model, choose, hasty = random_model(seed=3), KCenter.choose, []
    inputs = random_inputs(model, BATCH)
    expected = trimmed(model, inputs, {"prefill_pictures": 1, **config}, new=4, **mode)

    def too_few(rule, states, members, *, unread=None, **known):
        chosen = choose(rule, states, members, unread=unread, **known)
        if unread is None or unread.asks is None or len(hasty) > 7:
            return chosen
        hasty.append(len(hasty) % 2 == 0)
        unread.short.append(torch.tensor([hasty[-1]]))
        return chosen & (chosen.cumsum(dim=-1) < 2) if hasty[-1] else chosen

    with mock.patch.object(KCenter, "choose", too_few):
        ours = trimmed(model, inputs, {"prefill_pictures": 1, **config}, new=4, **mode)
    assert any(hasty)
    assert torch.equal(ours.sequences, expected.sequences)
    assert largest_difference(ours, expected) <= 1e-5
    assert all(map(torch.equal, cache_of(ours).kept_indices, cache_of(expected).kept_indices))


@pytest.mark.parametrize("rule", [None, KCenter(0.4)])
@pytest.mark.parametrize("config", [{}, {"top_k_ratio": 0.3}, {"top_k_ratio": 1.0}])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}])
def test_samples_with_unequally_many_encoded_pictures(rule, config, mode):
    """A piece's mask covers as many pictures as the batch's fullest sample has."""
    model, processor = load_small_model()
    drawn = [example.picture for example in examples()]
    pictures = [encode_pictures(model, processor, drawn[:count], rule=rule) for count in (1, 3, 2)]
    asked = [own.inputs(processor, "Read all digits.") for own in pictures]
    longest = max(one["input_ids"].shape[1] for one in asked)

    def stacked(name, value=0):
        rows = [one[name][0] for one in asked]
        missing = [longest - len(row) for row in rows]
        more = [[0, 0, 0, 3 - row.shape[1]] if row.ndim == 3 else [] for row in rows]
        padded = (
            torch.nn.functional.pad(row, (*own, left, 0), value=value)
            for row, own, left in zip(rows, more, missing, strict=True)
        )
        return torch.stack(list(padded))

    inputs = {name: stacked(name) for name in ("input_ids", "attention_mask", "cross_attention_mask")}
    whole, ours = (
        generate(model, inputs, 4, cache=TrimmedCache(model, config | pieces, pictures=pictures), **mode)
        for pieces in ({}, {"prefill_pictures": 1})
    )
    assert torch.equal(whole.sequences, ours.sequences)
    assert largest_difference(ours, whole) <= 1e-5 * largest_logit(whole)
    assert all(map(torch.equal, cache_of(ours).kept_indices, cache_of(whole).kept_indices))


@pytest.mark.parametrize("pieces", [{}, {"prefill_pictures": 1}])
@pytest.mark.parametrize("config", [{}, {"processors": [KCenter(0.3)], "merge": False}, {"top_k_ratio": 1.0}])
@pytest.mark.parametrize("parts", [(4, 4, 4), (4, 0, 4), (2, 4, 0), (3, 1, 2)])
def test_a_later_turn_keeps_what_its_samples_go_on_reading(pieces, config, parts):
    """Of the first picture all four tiles, some or none, whatever the other samples read of theirs."""
    model = random_model(seed=6)
    first = random_inputs(model, [Sample(((6,), 3)) for _ in parts])
    first["cross_attention_mask"][:] = 1
    cache = TrimmedCache(model, config | pieces)
    prefill(model, cache, **first)
    before = [kept.tolist() for kept in cache.kept_indices]
    second = {name: tensor[:, :2] for name, tensor in random_inputs(model, [Sample(((6,), 1))] * len(parts)).items()}
    mask = torch.zeros(len(parts), 2, 2, 4, dtype=torch.long)
    mask[:, :, 1] = 1
    for sample, part in enumerate(parts):
        mask[sample, :, 0, :part] = 1
    del second["attention_mask"]
    second |= {name: first[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    if not slices_mask_rows():  # there the model takes the rows of the new text out itself
        mask = torch.cat([torch.zeros(len(parts), first["input_ids"].shape[1], 2, 4, dtype=torch.long), mask], dim=1)
    second["cross_attention_mask"] = mask
    prefill(model, cache, **second)
    for kept, earlier, part in zip(cache.kept_indices, before, parts, strict=True):
        assert kept.tolist() == [token for token in earlier if token < 5 * part] + [20 + token for token in earlier]
