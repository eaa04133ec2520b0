"""KCenter, against a restatement that goes token by token."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trim_plugin import KCenter, TopKPerHead, VisualTokenProcessorList
from trim_plugin.arithmetic import FEATURES
from trim_plugin.compat import cache_of
from trim_plugin.forward import turn
from trim_plugin.selection import k_center

from ..accelerator.emulation import Emulation
from ..random_models import Sample, random_inputs, random_model, trimmed


@pytest.fixture(scope="module", autouse=True, params=["one by one", "in rounds"])
def choosing(request):
    """How few tokens are chosen; many are always chosen in rounds."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "in rounds":
            patch.setattr(k_center, "FEW", 0)
            patch.setattr(k_center, "SINGLY", 0)
        yield request.param


#: Cosines that differ by less may be in either order: what `rounds.EQUAL` calls equal.
NEARLY = 1.2e-5


def chosen_slowly(states, members, ours, count=None, radius=None):
    """The tokens of one sample, chosen one by one; of (nearly) equal ones those that are in `ours`."""
    tokens = [token for token in range(len(members)) if members[token]]
    rows = {token: states[token].double() / states[token].double().norm() for token in tokens}

    def lowest(values):
        least = min(values.values())
        return min((token for token in values if values[token] < least + NEARLY), key=lambda token: token not in ours)

    mean = sum(rows.values())
    mean /= mean.norm()
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
    chosen = KCenter(radius=radius).choose(states, members)
    for sample in range(len(states)):
        ours = chosen[sample].nonzero()[:, 0].tolist()
        assert ours == chosen_slowly(states[sample], members[sample], ours, radius=radius)


def smooth(tokens, generator):
    """Neighbours are alike, as on a picture."""
    side = math.isqrt(tokens - 1) + 1
    coarse = torch.randn(1, 64, side // 5 + 2, side // 5 + 2, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")[0].flatten(1).T[:tokens]
    return fine + 0.3 * torch.randn(fine.shape, generator=generator)


def clustered(tokens, generator):
    """Sixty things, each seen many times."""
    which = torch.randint(0, 60, (tokens,), generator=generator)
    return torch.randn(60, 64, generator=generator)[which] + 0.3 * torch.randn(tokens, 64, generator=generator)


def noise(tokens, generator):
    return torch.randn(tokens, 64, generator=generator)


def blank(tokens, generator):
    """Half of it is one colour."""
    states = smooth(tokens, generator)
    states[: tokens // 2] = states[0]
    return states


def near(tokens, generator):
    """A smooth path of states that are all nearly the same: distances of a thousandth."""
    steps = 0.02 * torch.randn(tokens, 64, generator=generator).cumsum(dim=0)
    return 3 * torch.randn(1, 64, generator=generator) + steps + 0.02 * torch.randn(tokens, 64, generator=generator)


def cover(states, chosen):
    """The largest and the mean distance to a chosen token."""
    rows = torch.nn.functional.normalize(states.double(), dim=-1)
    distance = 1 - (rows @ rows[chosen].T).amax(dim=1)
    return float(distance.max()), float(distance.mean())


def greedily(states, count):
    rows = torch.nn.functional.normalize(states.double(), dim=-1)
    chosen = [int((rows @ rows.sum(dim=0)).argmax())]
    nearest = rows @ rows[chosen[0]]
    while len(chosen) < count:
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, rows @ rows[chosen[-1]])
    return torch.tensor(chosen)


# The same draws every time: the largest distance is that of one token, and may be worse once in thousands.
@settings(max_examples=24, derandomize=True)
@given(
    st.sampled_from([smooth, clustered, noise, blank, near]),
    st.one_of(st.integers(200, 1200), st.integers(1201, 2500)),
    st.sampled_from([0.05, 0.1, 0.25, 0.35, 0.5]),
    st.integers(0, 2**20),
)
def test_it_covers_as_the_greedy_choice_does(choosing, kind, tokens, kept_share, seed):
    if choosing == "in rounds":
        pytest.skip("this is about what is chosen in rounds, and what is not")
    states = kind(tokens, torch.Generator().manual_seed(seed))
    everything = torch.ones(1, tokens, dtype=torch.bool)
    chosen = KCenter(kept_share).choose(states[None], everything)[0].nonzero()[:, 0]
    assert len(chosen) == math.ceil(kept_share * tokens - 1e-9)
    radius, mean = cover(states, greedily(states, len(chosen)))
    found = cover(states, chosen)
    assert found[0] <= 1.03 * radius + 1e-6
    assert found[1] <= 1.03 * mean + 1e-6


@pytest.mark.parametrize("kept_share", [0.1, 0.35])
def test_a_page_is_covered_within_three_per_cent(kept_share, choosing):
    if choosing == "in rounds":
        pytest.skip("a page is chosen in rounds either way")
    ratios = []
    for kind in (smooth, clustered, noise, blank):
        states = kind(6404, torch.Generator().manual_seed(1))
        chosen = KCenter(kept_share).choose(states[None], torch.ones(1, 6404, dtype=torch.bool))[0].nonzero()[:, 0]
        found, best = cover(states, chosen), cover(states, greedily(states, len(chosen)))
        ratios.append([found[0] / best[0], found[1] / best[1]])
    radius, mean = torch.tensor(ratios).unbind(dim=1)
    assert float(radius.max()) <= 1.03
    assert float(mean.max()) <= 1.03


@settings(max_examples=8)
@given(
    st.sampled_from([smooth, clustered, noise, blank]),
    st.integers(100, 1000),
    st.floats(0.05, 0.9),
    st.integers(0, 2**20),
)
def test_a_radius_covers_all_and_takes_no_two_tokens_within_it(kind, tokens, radius, seed):
    states = kind(tokens, torch.Generator().manual_seed(seed))
    chosen = KCenter(radius=radius).choose(states[None], torch.ones(1, tokens, dtype=torch.bool))[0].nonzero()[:, 0]
    assert cover(states, chosen)[0] <= radius + 1e-5
    rows = torch.nn.functional.normalize(states.double(), dim=-1)[chosen]
    apart = (1 - rows @ rows.T).masked_fill(torch.eye(len(chosen), dtype=torch.bool), 2.0)
    assert float(apart.min()) >= radius - 1e-4


@settings(max_examples=8)
@given(st.lists(st.integers(1, 400), min_size=2, max_size=4), st.sampled_from([KCenter(0.2), KCenter(radius=0.4)]))
def test_in_company_as_alone(lengths, rule):
    """Samples and groups of other sizes change nothing; blocks of rows neither."""
    generator = torch.Generator().manual_seed(sum(lengths))
    states = smooth(sum(lengths), generator)
    together = torch.stack([states, states.flip(0)])
    ends = torch.tensor(lengths).cumsum(0)
    group = torch.bucketize(torch.arange(len(states)), ends, right=True)
    members = torch.stack([group == number for number in range(len(lengths))])
    both = torch.stack([members, members.flip(1)])
    chosen = rule.choose(together, both)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(k_center, "COVER_BYTES", 1)
        assert torch.equal(rule.choose(together, both), chosen)
    for sample, group in itertools.product(range(2), range(len(lengths))):
        own = both[sample, group]
        alone = rule.choose(together[sample][own][None], torch.ones(1, int(own.sum()), dtype=torch.bool))[0]
        assert torch.equal(chosen[sample, group][own], alone)
        assert not bool(chosen[sample, group][~own].any())


@pytest.mark.parametrize(
    ("rule", "most", "reads"),
    [(KCenter(0.1), 360, 3), (KCenter(0.35), 360, 3), (KCenter(0.5), 410, 3), (KCenter(radius=0.3), 500, 5)],
)
def test_a_page_is_chosen_in_few_launches(rule, most, reads, choosing):
    """One page of the 11B model as it is chosen on a GPU, where a launch costs more than its arithmetic."""
    if choosing == "in rounds":
        pytest.skip("a page is chosen in rounds either way")
    generator = torch.Generator().manual_seed(0)
    states = smooth(6404, generator) @ torch.randn(64, 4096, generator=generator)
    with Emulation() as device:
        states, members = states[None].to("cuda"), torch.ones(1, 6404, dtype=torch.bool).to("cuda")
        rule.choose(states, members)  # tables and the projection are made once
        device.clear()
        rule.choose(states, members)
    assert device.launches.total() <= most
    assert device.reads.total() <= reads, "once for how many members there are, and to see whether it is done"
    assert device.copies.total() == 0


def test_pages_are_chosen_from_together_however_small_the_share(choosing):
    """A GPU's launches are those of one page."""
    if choosing == "in rounds":
        pytest.skip("a page is chosen in rounds either way")
    states = smooth(2 * 6404, torch.Generator().manual_seed(0)).view(2, 6404, 64)
    with Emulation() as device:
        states, members = states.to("cuda"), torch.ones(2, 6404, dtype=torch.bool).to("cuda")
        KCenter(0.05).choose(states, members)  # tables are made once
        device.clear()
        KCenter(0.05).choose(states[:1], members[:1])
        one = device.launches.total()
        device.clear()
        KCenter(0.05).choose(states, members)
    assert device.launches.total() <= 1.5 * one


def test_a_share_may_be_as_small_as_a_number_can_be():
    chosen = KCenter(1e-310).choose(torch.randn(1, 50, 8), torch.ones(1, 50, dtype=torch.bool))
    assert int(chosen.sum()) == 1


def test_few_and_many_in_one_batch_are_each_as_alone(choosing):
    """Groups of both kinds, and a sample without any members."""
    generator = torch.Generator().manual_seed(5)
    states, members = torch.randn(3, 1500, 16, generator=generator), torch.zeros(3, 2, 1500, dtype=torch.bool)
    members[0, 0, 100:1400] = members[0, 1, 1400:] = members[1, 0, :300] = True
    for rule in (KCenter(0.2), KCenter(radius=0.5)):
        chosen = rule.choose(states, members)
        for sample, group in itertools.product(range(3), range(2)):
            alone = rule.choose(states[sample : sample + 1], members[sample : sample + 1, group])
            assert torch.equal(chosen[sample, group], alone[0])
    assert KCenter(0.2).choose(states, members).sum(dim=2).tolist() == [[260, 20], [60, 0], [0, 0]]


@pytest.mark.parametrize("radius", [False, True])
def test_few_tokens_are_chosen_exactly_as_the_greedy_choice(choosing, radius):
    if choosing != "one by one":
        pytest.skip("of few tokens")
    states = smooth(700, torch.Generator().manual_seed(3))
    greedy = greedily(states, 200)
    rule = KCenter(200 / 700)
    if radius:
        rule = KCenter(radius=cover(states, greedy)[0] + 1e-4)
    chosen = rule.choose(states[None], torch.ones(1, 700, dtype=torch.bool))[0].nonzero()[:, 0]
    assert len(chosen) == (200 if not radius else pytest.approx(200, abs=2))
    assert set(chosen.tolist()) <= set(greedy.tolist())


def test_states_that_are_not_numbers():
    states = torch.randn(1, 40, 8)
    states[0, 3, 2] = math.nan
    for rule in (KCenter(0.5), KCenter(radius=0.5)):
        with pytest.raises(ValueError, match="visual states are NaN"):
            rule.choose(states, torch.ones(1, 40, dtype=torch.bool))


def test_no_scores_are_worked_out_for_it(monkeypatch):
    """It needs no prompt: a prefill that chooses by it alone skips the attention scores, and chooses the same."""
    model = random_model(image_size=16)
    inputs = random_inputs(model, [Sample((1, (6,), 4, (3,), 5)), Sample((1, (2,), 3))])

    class Watching(KCenter):
        needs_scores = True

    with_scores = cache_of(trimmed(model, inputs, {"processors": [Watching(0.25)]}))
    monkeypatch.setattr(turn, "visual_token_scores", None)
    without = cache_of(trimmed(model, inputs, {"processors": [KCenter(0.25)]}))
    assert all(map(torch.equal, with_scores.kept_indices, without.kept_indices))


def test_equal_tokens_are_covered_by_one():
    states = torch.ones(1, 200, 4)
    assert KCenter(radius=0.1).choose(states, torch.ones(1, 200, dtype=torch.bool)).sum() == 1


def test_wide_states_are_covered_after_the_projection():
    """Forty directions, some of them seen once only: forty tokens have to find them all, drawn ones don't."""
    directions = torch.randn(40, 4 * FEATURES)
    which = torch.cat([torch.arange(40), torch.randint(0, 10, (360,))])
    states = (directions[which] + 0.05 * torch.randn(400, 4 * FEATURES))[None]
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
    states, members = torch.randn(1, 200, 2 * FEATURES), torch.ones(1, 200, dtype=torch.bool)
    chosen = []
    for seed in (1, 2):
        k_center._projection.cache_clear()
        torch.manual_seed(seed)
        chosen.append(KCenter(0.2).choose(states, members))
    assert torch.equal(*chosen)


@pytest.mark.parametrize("length", [0.0, 1e-38, 1e-30, 1e-22, 1e-17])
def test_states_too_short_for_their_squares_are_chosen_from_all_the_same(length):
    states = length * torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    members = torch.ones(2, 50, dtype=torch.bool)
    assert KCenter(0.35).choose(states, members).sum(dim=1).tolist() == [18, 18]
    assert bool(KCenter(radius=0.3).choose(states, members).any(dim=1).all())
