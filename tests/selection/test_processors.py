import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trim_plugin import TopKPerHead, TopPPerHead, VisualTokenProcessorList

INF = float("inf")


@st.composite
def scored_groups(draw):
    batch, heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 12))
    # Few distinct values, so that ties are common.
    values = draw(st.lists(st.integers(0, 4), min_size=batch * heads * tokens, max_size=batch * heads * tokens))
    seen = draw(st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens))
    visible = torch.tensor(seen).view(batch, tokens)
    visible[:, draw(st.integers(0, tokens - 1))] = True
    scores = torch.tensor(values).float().view(batch, heads, tokens).masked_fill(~visible[:, None], -INF)
    return scores, visible


@given(scored_groups(), st.floats(0.01, 1.0))
def test_top_k_keeps_the_k_best_and_prefers_lower_indices(group, ratio):
    scores, visible = group
    kept = TopKPerHead(ratio)(scores, visible)
    for sample in range(len(scores)):
        members = visible[sample].nonzero()[:, 0].tolist()
        k = max(1, math.ceil(ratio * len(members)))
        for head in range(scores.shape[1]):
            row = scores[sample, head]
            expected = sorted(sorted(members, key=lambda token: (-float(row[token]), token))[:k])
            assert (kept[sample, head] > -INF).nonzero()[:, 0].tolist() == expected
            assert torch.equal(kept[sample, head, expected], row[expected])


@given(scored_groups(), st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_tokens_that_hold_the_mass(group, mass):
    scores, visible = group
    kept = TopPPerHead(mass)(scores, visible) > -INF
    for sample in range(len(scores)):
        for head in range(scores.shape[1]):
            row, chosen = scores[sample, head].clamp(min=0), kept[sample, head]
            assert chosen.any()
            assert not (chosen & ~visible[sample]).any()
            wanted = mass * float(row[visible[sample]].sum())
            held = float(row[chosen].sum())
            assert held >= wanted * (1 - 1e-5)
            if chosen.sum() > 1:
                assert held - float(row[chosen].min()) < wanted * (1 + 1e-5)


def test_a_list_chains_and_removed_tokens_stay_removed():
    scores = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]])
    visible = torch.ones(1, 4, dtype=torch.bool)
    no_first = lambda scores, visible: scores.index_fill(-1, torch.tensor([0]), -INF)  # noqa: E731
    kept = VisualTokenProcessorList([no_first, TopKPerHead(0.5)])(scores, visible)
    assert (kept[0, 0] > -INF).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("processor", "error", "message"),
    [
        (lambda scores, visible: scores[:, :1], ValueError, "returned scores of shape"),
        (lambda scores, visible: scores * float("nan"), ValueError, "returned NaN"),
        (lambda scores, visible: None, TypeError, "returned NoneType instead of a tensor"),
    ],
)
def test_bad_processors_are_named(processor, error, message):
    with pytest.raises(error, match=rf"<lambda>.*{message}"):
        VisualTokenProcessorList([processor])(torch.ones(1, 2, 3), torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize("cls", [TopKPerHead, TopPPerHead])
@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), "0.5"])
def test_shares_are_checked(cls, value):
    with pytest.raises(ValueError, match=r"must be a number in \(0, 1\]"):
        cls(value)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 30), st.integers(0, 2**20), st.floats(0.01, 1.0))
def test_all_groups_at_once_are_chosen_as_one_by_one(batch, groups, tokens, seed, ratio):
    """Scores with many ties, tokens of no group, and samples that lack a group."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(4, (batch, 3, tokens), generator=generator).float()
    group = torch.randint(-1, groups, (batch, tokens), generator=generator)
    rule = VisualTokenProcessorList([TopKPerHead(ratio), TopKPerHead(0.5)])
    expected = torch.full_like(scores, -INF)
    for number in range(groups):
        members = group == number
        chosen = rule(scores.masked_fill(~members[:, None], -INF), members)
        expected = torch.maximum(expected, chosen)
    assert torch.equal(rule.in_groups(scores, group, groups), expected)


def test_a_rule_that_overrides_a_shipped_one_is_asked_itself():
    class Mine(TopKPerHead):
        def __call__(self, scores, visible):
            return scores

    class MineForAll(Mine):
        def in_groups(self, scores, group, groups):
            return scores

    assert VisualTokenProcessorList([TopKPerHead(0.5)]).knows_groups
    assert VisualTokenProcessorList([MineForAll(0.5), TopKPerHead(0.5)]).knows_groups
    for other in (Mine(0.5), TopPPerHead(0.5), lambda scores, visible: scores):
        assert not VisualTokenProcessorList([TopKPerHead(0.5), other]).knows_groups
