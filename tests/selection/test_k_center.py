"""KCenter, against a restatement that goes token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trim_plugin import KCenter, TopKPerHead, VisualTokenProcessorList
from trim_plugin.compat import cache_of
from trim_plugin.selection import k_center

from ..random_models import Sample, random_inputs, random_model, trimmed


def chosen_slowly(states, members, ours, count=None, radius=None):
    """The tokens of one sample, chosen one by one; of (nearly) equal ones those that are in `ours`."""
    tokens = [token for token in range(len(members)) if members[token]]
    rows = {token: states[token].double() / states[token].double().norm() for token in tokens}

    def lowest(values):
        least = min(values.values())
        return min((token for token in values if values[token] < least + 1e-6), key=lambda token: token not in ours)

    mean = sum(rows.values())
    chosen = [lowest({token: -float(rows[token] @ mean) for token in tokens})]
    while len(chosen) < len(tokens):
        nearest = {
            token: max(float(rows[token] @ rows[other]) for other in chosen) for token in tokens if token not in chosen
        }
        farthest = lowest(nearest)
        if len(chosen) == count or (radius is not None and 1 - nearest[farthest] <= radius):
            break
        chosen.append(farthest)
    return sorted(chosen)


random_states = st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(2, 8), st.integers(0, 2**20))


@given(random_states, st.floats(0.01, 1.0))
def test_a_share_equals_the_restatement(shape, kept_share):
    *shape, seed = shape
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(shape, generator=generator)
    members = torch.rand(shape[:2], generator=generator) < 0.7
    members[:, 0] = True
    chosen = KCenter(kept_share).choose(states, members)
    for sample in range(len(states)):
        count = max(1, math.ceil(kept_share * int(members[sample].sum()) - 1e-9))
        ours = chosen[sample].nonzero()[:, 0].tolist()
        assert ours == chosen_slowly(states[sample], members[sample], ours, count)


@given(random_states, st.floats(0.05, 1.0))
def test_a_radius_equals_the_restatement(shape, radius):
    *shape, seed = shape
    states = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    members = torch.ones(shape[:2], dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(k_center, "STEPS", 3)
        chosen = KCenter(radius=radius).choose(states, members)
    for sample in range(len(states)):
        ours = chosen[sample].nonzero()[:, 0].tolist()
        assert ours == chosen_slowly(states[sample], members[sample], ours, radius=radius)


def test_equal_tokens_are_covered_by_one():
    states = torch.ones(1, 200, 4)
    assert KCenter(radius=0.1).choose(states, torch.ones(1, 200, dtype=torch.bool)).sum() == 1


def test_wide_states_are_covered_after_the_projection():
    """Forty directions, some of them seen once only: forty tokens have to find them all, drawn ones don't."""
    directions = torch.randn(40, 4 * k_center.FEATURES)
    which = torch.cat([torch.arange(40), torch.randint(0, 10, (360,))])
    states = (directions[which] + 0.05 * torch.randn(400, 4 * k_center.FEATURES))[None]
    chosen = KCenter(0.1).choose(states, torch.ones(1, 400, dtype=torch.bool))
    assert sorted(which[chosen[0]].tolist()) == list(range(40))


def test_the_share_is_of_each_visibility_group_and_works_in_generate():
    model = random_model(image_size=16)
    inputs = random_inputs(model, [Sample((1, (6,), 4, (3,), 5)), Sample((1, (2,), 3))])
    cache = cache_of(trimmed(model, inputs, {"processors": [KCenter(0.25)]}))
    # 4 and 3 tiles in the first sample, of which the last text row reads the second picture only; 2 tiles in the second.
    assert [len(kept) for kept in cache.kept_indices] == [math.ceil(0.25 * 3 * 17), math.ceil(0.25 * 2 * 17)]
    assert [int(sizes.sum()) for sizes in cache.kept_sizes] == [3 * 17, 2 * 17]


def test_it_chooses_among_what_earlier_processors_left():
    scores, states = torch.rand(1, 2, 40), torch.randn(1, 40, 8)
    visible = torch.ones(1, 40, dtype=torch.bool)
    first = TopKPerHead(0.3)(scores, visible) > -math.inf
    both = VisualTokenProcessorList([TopKPerHead(0.3), KCenter(0.2)])(scores, visible, states) > -math.inf
    assert bool((both <= first).all())
    assert torch.equal(both.any(1), KCenter(0.2).choose(states, first.any(1)))


@pytest.mark.parametrize("arguments", [{}, {"kept_share": 0.1, "radius": 0.1}])
def test_one_of_share_and_radius(arguments):
    with pytest.raises(ValueError, match="either kept_share or radius"):
        KCenter(**arguments)


@pytest.mark.parametrize("value", [0, 1.5, True, "0.1", float("nan")])
@pytest.mark.parametrize("name", ["kept_share", "radius"])
def test_not_a_share(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number"):
        KCenter(**{name: value})


def test_without_states():
    with pytest.raises(TypeError, match="needs the visual states"):
        KCenter(0.5)(torch.ones(1, 1, 4), torch.ones(1, 4, dtype=torch.bool))


def test_a_share_of_equal_tokens_is_that_many_all_the_same():
    """A blank page, or padding: what was chosen once is not chosen again, however near everything is."""
    members = torch.tensor([[True] * 50, [True] * 30 + [False] * 20])
    chosen = KCenter(0.3).choose(torch.ones(2, 50, 4), members)
    assert chosen.sum(dim=1).tolist() == [15, 9]


@pytest.mark.parametrize(
    ("kept_share", "tokens", "kept"), [(0.07, 100, 7), (0.1, 260, 26), (0.29, 100, 29), (0.101, 100, 11)]
)
def test_a_share_that_is_a_whole_number_of_tokens_is_not_rounded_up(kept_share, tokens, kept):
    chosen = KCenter(kept_share).choose(torch.randn(1, tokens, 4), torch.ones(1, tokens, dtype=torch.bool))
    assert int(chosen.sum()) == kept


def test_wide_states_are_projected_alike_whatever_the_seed():
    states, members = torch.randn(1, 200, 2 * k_center.FEATURES), torch.ones(1, 200, dtype=torch.bool)
    chosen = []
    for seed in (1, 2):
        k_center._projection.cache_clear()
        torch.manual_seed(seed)
        chosen.append(KCenter(0.2).choose(states, members))
    assert torch.equal(*chosen)
