"""Merging, against a restatement that goes token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trim_plugin import KCenter
from trim_plugin.compat import cache_of
from trim_plugin.selection import merging
from trim_plugin.selection.merging import merge_dropped
from trim_plugin.selection.visibility import add_log_sizes, pack

from ..random_models import Sample, random_inputs, random_model, trimmed


def merged_slowly(states, kept, groups, sizes, features):
    """For every kept token of one sample: (its size, the weighted mean of its members' features)."""
    members = {token: [token] for token in range(len(kept)) if kept[token]}
    for token in range(len(kept)):
        if kept[token] or groups[token] < 0:
            continue
        best, highest = None, -math.inf
        for target in members:
            if groups[target] == groups[token]:
                one, other = states[token].double(), states[target].double()
                cosine = float(one @ other / (one.norm() * other.norm()))
                if cosine > highest:
                    best, highest = target, cosine
        members[best].append(token)
    result = []
    for _, own in sorted(members.items()):
        size = sum(int(sizes[token]) for token in own)
        result.append((size, sum(features[token].double() * int(sizes[token]) for token in own) / size))
    return result


@st.composite
def choices(draw):
    """Random states with several groups; every group that has a token keeps one at least."""
    batch, tokens, width = draw(st.integers(1, 3)), draw(st.integers(2, 40)), draw(st.integers(2, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    states = torch.randn(batch, tokens, width, generator=generator)
    groups = torch.randint(-1, draw(st.integers(1, 3)), (batch, tokens), generator=generator)
    kept = torch.rand(batch, tokens, generator=generator) < draw(st.floats(0.05, 0.9))
    for sample in range(batch):
        for group in range(3):
            own = (groups[sample] == group).nonzero()[:, 0]
            if len(own) and not kept[sample, own].any():
                kept[sample, own[0]] = True
    kept &= groups >= 0
    kept[:, 0] |= ~kept.any(dim=1)
    sizes = torch.randint(1, 5, (batch, tokens), generator=generator)
    return states, kept, groups, sizes


@given(choices(), st.sampled_from([8, 2**20]))
def test_equals_the_restatement(choice, block_values):
    """In one block and in many."""
    states, kept, groups, sizes = choice
    features = torch.randn(len(states), 2, states.shape[1], 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "BLOCK_VALUES", block_values)
        positions, valid = pack(kept)
        merged = merge_dropped(states, kept, groups, sizes, positions)
        means, mean_states = merged.mean(features), merged.mean(states)
    for sample in range(len(states)):
        given_sizes = sizes[sample]
        expected = merged_slowly(states[sample], kept[sample], groups[sample], given_sizes, states[sample])
        assert merged.sizes[sample, valid[sample]].tolist() == [size for size, _ in expected]
        torch.testing.assert_close(
            mean_states[sample, valid[sample]].double(), torch.stack([m for _, m in expected]), atol=1e-5, rtol=1e-5
        )
        by_token = features[sample].transpose(0, 1)
        expected = merged_slowly(states[sample], kept[sample], groups[sample], given_sizes, by_token)
        found = means[sample].transpose(0, 1)[valid[sample]].double()
        torch.testing.assert_close(found, torch.stack([m for _, m in expected]), atol=1e-5, rtol=1e-5)


def test_a_token_alone_is_left_as_it_is_in_bfloat16():
    states = torch.randn(1, 6, 4, dtype=torch.bfloat16)
    kept = torch.ones(1, 6, dtype=torch.bool)
    merged = merge_dropped(states, kept, torch.zeros(1, 6).long(), torch.ones(1, 6).long(), torch.arange(6)[None])
    assert torch.equal(merged.mean(states), states)


def test_means_of_many_bfloat16_states_keep_their_digits():
    states = torch.ones(1, 3001, 2, dtype=torch.bfloat16)
    states[:, 1:] += torch.rand(1, 3000, 2)
    kept = torch.arange(3001)[None] == 0
    zeros = torch.zeros(1, 3001).long()
    merged = merge_dropped(states, kept, zeros, zeros + 1, torch.tensor([[0]]))
    torch.testing.assert_close(merged.mean(states)[0, 0].float(), states[0].double().mean(0).float(), rtol=4e-3, atol=0)


def test_tokens_that_nobody_reads_join_nothing_even_if_they_are_not_finite():
    states = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [float("inf"), float("nan")]]])
    kept, groups = torch.tensor([[True, False, False]]), torch.tensor([[0, 0, -1]])
    merged = merge_dropped(states, kept, groups, torch.ones(1, 3).long(), torch.tensor([[0]]))
    assert merged.sizes.tolist() == [[2]]
    torch.testing.assert_close(merged.mean(states), torch.tensor([[[0.95, 0.05]]]))


def test_equal_tokens_with_a_log_size_are_read_as_all_of_them():
    """What the log size is for: n equal tokens and one of size n give the same attention."""
    query, key, other = torch.randn(3, 5)
    whole = torch.stack([key, key, key, other])
    one_by_one = (whole @ query).softmax(0) @ whole
    mask = add_log_sizes(torch.zeros(1, 1, 1, 2), torch.tensor([[3, 1]])).flatten()
    pair = torch.stack([key, other])
    torch.testing.assert_close((pair @ query + mask).softmax(0) @ pair, one_by_one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_closed_columns_stay_closed(dtype):
    lowest = torch.finfo(dtype).min
    mask = add_log_sizes(torch.tensor([[[[0.0, lowest]]]], dtype=dtype), torch.tensor([[2, 50_000]]))
    assert mask.dtype == dtype
    assert mask[..., 1].item() == lowest or mask[..., 1].item() < lowest / 2
    assert mask[..., 0].item() == pytest.approx(math.log(2), rel=1e-2)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_generation_compares_tokens_by_the_keys_of_the_first_cross_attention_layer(kv_heads):
    model = random_model(seed=5, image_size=16, heads=4, kv_heads=kv_heads)
    inputs = random_inputs(model, [Sample((1, (6,), 6)), Sample((1, (2,), 3))])
    with torch.no_grad():
        stock = cache_of(model(**inputs, use_cache=True))
    keys = stock.layers[model.config.text_config.cross_attention_layers[0]].keys
    cache = cache_of(trimmed(model, inputs, {"top_k_ratio": 0.05}, new=1))
    for sample, (index, sizes) in enumerate(zip(cache.kept_indices, cache.kept_sizes, strict=True)):
        read = inputs["cross_attention_mask"][sample, -1].flatten().bool().repeat_interleave(17)
        own = keys[sample].transpose(0, 1).flatten(1)
        kept = torch.zeros(len(own), dtype=torch.bool)
        kept[index] = True
        groups = torch.where(read, 0, -1)
        expected = merged_slowly(own, kept, groups, torch.ones(len(own)).long(), own)
        assert sizes.tolist() == [size for size, _ in expected]
        assert max(sizes) > 1


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.enable_grad, torch.inference_mode, lambda: torch.autocast("cpu")]
)
def test_the_choice_is_the_same_whatever_surrounds_it(context):
    """Autocast would compare tokens in bfloat16, and what is out of place cannot be differentiated."""
    states = torch.randn(2, 300, 32, generator=torch.Generator().manual_seed(0))
    states += 8 * torch.ones(32)  # much alike, so that digits matter
    members, zeros = torch.ones(2, 300, dtype=torch.bool), torch.zeros(2, 300).long()
    expected = {}
    for given_states in (states, states.clone().requires_grad_()):
        with context() if given_states.requires_grad else torch.no_grad():
            for rule in (KCenter(0.1), KCenter(radius=0.01)):
                kept = rule.choose(given_states, members)
                positions, _ = pack(kept)
                merged = merge_dropped(given_states, kept, zeros, zeros + 1, positions)
                found = [kept, merged.slots, merged.sizes, merged.mean(given_states).detach()]
                for ours, first in zip(found, expected.setdefault(repr(rule), found), strict=True):
                    torch.testing.assert_close(ours, first, rtol=0, atol=1e-5)
                assert not merged.slots.requires_grad


def test_gradients_flow_through_the_means():
    states = torch.randn(1, 3, 4, requires_grad=True)
    kept = torch.tensor([[True, False, True]])
    ones = torch.ones(1, 3).long()
    merge_dropped(states, kept, torch.tensor([[0, 0, 1]]), ones, torch.tensor([[0, 2]])).mean(states).sum().backward()
    assert torch.equal(states.grad[0, :, 0], torch.tensor([0.5, 0.5, 1.0]))


def test_of_equal_kept_tokens_the_first_is_joined(monkeypatch):
    """Within a block and across blocks: bfloat16 makes equal keys common, and a batch must merge as its samples alone do."""
    monkeypatch.setattr(merging, "BLOCK_VALUES", 64)  # 16 of the 64 kept tokens at a time
    kept = torch.arange(128)[None] % 2 == 1
    ones, zeros = torch.ones(1, 128).long(), torch.zeros(1, 128).long()
    merged = merge_dropped(torch.ones(1, 128, 4), kept, zeros, ones, pack(kept)[0])
    assert merged.sizes.tolist() == [[65] + [1] * 63]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sizes_that_the_dtype_cannot_hold(dtype):
    mask = add_log_sizes(torch.zeros(1, 1, 1, 2, dtype=dtype), torch.tensor([[100_000, 3]]))
    assert mask.flatten().tolist() == pytest.approx([math.log(100_000), math.log(3)], rel=4e-3)
