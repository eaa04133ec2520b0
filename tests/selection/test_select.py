import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trim_plugin import KCenter, TopKPerHead, VisualTokenProcessorList
from trim_plugin.selection.k_center import short_ones
from trim_plugin.selection.rounds import Unread
from trim_plugin.selection.select import Columns, KnownGroups, select
from trim_plugin.selection.visibility import Tiles, Visibility, of_tiles

INF = float("inf")


def columns(groups, first_new=0):
    """Columns with these groups, lists of samples; −1 for earlier tokens and for what nobody reads."""
    group = torch.tensor(groups)
    index = torch.arange(group.shape[1]).expand_as(group)
    ones = torch.ones_like(group)
    return Columns(index, ones.bool(), ones, group, ones.bool(), first_new, tile_tokens=1)


#: Sample 0 has two groups, sample 1 one, and nobody reads anything in sample 2.
MIXED = [[0, 0, 0, 1, 1, 1], [0] * 6, [-1] * 6]


def chosen(scores, about, rule, groups=2, merge=False):
    """bool (samples, new columns): what is kept."""
    batch, _, width = scores.shape
    keys = torch.randn(batch, 1, width, 4)
    new = width - about.first_new
    picked = select(scores, keys, torch.randn(batch, new, 4), about, groups, VisualTokenProcessorList([rule]), merge)
    if picked.positions is None:
        return torch.ones(batch, new, dtype=torch.bool), picked
    kept = torch.zeros(batch, new, dtype=torch.bool)
    for row, places, present in zip(kept, picked.positions, picked.present, strict=True):
        row[places[present]] = True
    return kept, picked


def test_every_group_keeps_its_best_and_a_sample_that_nobody_reads_keeps_all():
    scores = torch.tensor([[[9, 8, 7, 1, 2, 3.0]], [[9, 8, 7, 1, 2, 3.0]], [[-INF] * 6]])
    kept, picked = chosen(scores, columns(MIXED), TopKPerHead(0.3))
    assert kept.int().tolist() == [[1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0], [1] * 6]
    assert picked.readable_counts == [2, 2, 6]
    assert picked.merging is None


def test_dropped_tokens_join_a_kept_one_of_their_group_and_their_sizes_add_up():
    _, picked = chosen(torch.rand(3, 2, 6), columns(MIXED), TopKPerHead(0.3), merge=True)
    assert picked.merging.sizes.masked_fill(~picked.present, 0).sum(dim=1).tolist() == [6, 6, 6]
    assert torch.equal(picked.merging.sizes[2], torch.ones(6, dtype=torch.long))


def test_processors_see_one_group_at_a_time_and_never_an_empty_one():
    calls = []

    def watch(scores, visible):
        calls.append((scores.clone(), visible.int().tolist()))
        return scores

    chosen(torch.rand(3, 2, 6), columns(MIXED), watch)
    assert [visible[0] for _, visible in calls] == [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]
    assert calls[0][1][1] == [1] * 6
    for scores, visible in calls:
        assert all(any(row) for row in visible)
        assert torch.equal(scores.isinf().any(1), torch.tensor(visible) == 0)


def test_the_union_over_heads_survives():
    scores = torch.tensor([[[4, 1, 1, 1.0], [1, 1, 4, 1.0]]])
    kept, _ = chosen(scores, columns([[0] * 4]), TopKPerHead(0.25), groups=1)
    assert kept.int().tolist() == [[1, 0, 1, 0]]


def test_tokens_of_earlier_turns_are_not_asked_about_and_stay():
    kept, picked = chosen(
        torch.tensor([[[0, 0, 9, 1, 2.0]]]), columns([[-1, -1, 0, 0, 0]], first_new=2), TopKPerHead(0.3), groups=1
    )
    assert kept.int().tolist() == [[1, 0, 0]]
    assert picked.readable_counts == [3]


def test_columns_are_narrowed_to_what_is_kept():
    about = columns([[-1, -1, 0, 0, 0]], first_new=2)
    _, picked = chosen(torch.tensor([[[0, 0, 9, 1, 2.0]]]), about, TopKPerHead(0.3), groups=1, merge=True)
    left = about.narrowed(picked)
    assert left.index.tolist() == [[0, 1, 2]]
    assert left.sizes.tolist() == [[1, 1, 3]]
    assert left.first_new == 2


def test_an_emptied_group_is_an_error_that_names_it():
    def drop_later(scores, visible):
        return scores.masked_fill(torch.arange(6) >= 3, -INF)

    with pytest.raises(ValueError, match="removed every visual token of visibility group 1 in sample 0"):
        chosen(torch.rand(3, 2, 6), columns(MIXED), drop_later)


@pytest.mark.parametrize("group", [0, 1])
def test_nan_is_found_wherever_it_comes_from(group):
    def spoil(scores, visible):
        return scores * float("nan") if bool(visible[0, 3]) == bool(group) else scores

    with pytest.raises(ValueError, match="spoil returned NaN"):
        chosen(torch.rand(3, 2, 6), columns(MIXED), spoil)
    scores = torch.rand(3, 2, 6)
    scores[1, 0, group] = float("nan")
    with pytest.raises(ValueError, match="attention scores of the visual tokens are NaN"):
        chosen(scores, columns(MIXED), TopKPerHead(0.5))


@given(
    batch=st.integers(1, 4),
    rows=st.integers(1, 4),
    old=st.integers(0, 3),
    tiles=st.integers(1, 4),
    tile_tokens=st.integers(1, 6),
    here=st.sampled_from([1.0, 0.7, 0.4]),
    kept_share=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_what_the_host_knows_beforehand_is_what_the_device_counts(
    batch, rows, old, tiles, tile_tokens, here, kept_share, seed
):
    """Of first and later turns, some of whose samples go on reading what they read before, and of pictures that lack tokens."""
    torch.manual_seed(seed)
    padding = torch.rand(batch, rows) < 0.2
    reads = (torch.rand(batch, rows, 1, old + tiles) < 0.6).long()
    reads[..., :old] *= torch.tensor([0, 1, 1])[torch.randint(3, (batch, 1, 1, 1))]
    about, known = turn_of(of_tiles(reads, padding), old, tile_tokens, here)
    if known is None:
        return
    keys = torch.randn(batch, 1, about.index.shape[1], 4)
    states = torch.randn(batch, about.index.shape[1] - about.first_new, 8)
    rule, groups = VisualTokenProcessorList([KCenter(kept_share)]), len(known.sizes[0])
    scores, later = torch.zeros(batch, 1, about.index.shape[1]), Unread()
    assert (
        select(None, keys, states, about, groups, rule, True, known).readable_counts == about.readable.sum(1).tolist()
    )
    told = select(scores, keys, states, about, groups, rule, True, known, later)
    counted = select(scores, keys, states, about, groups, rule, True)
    assert told.readable_counts == counted.readable_counts
    assert (told.positions is None, told.merging is None) == (counted.positions is None, counted.merging is None)
    if counted.positions is not None:
        assert torch.equal(told.positions, counted.positions)
        assert torch.equal(told.present, counted.present)
    if counted.merging is not None:
        assert torch.equal(told.merging.slots, counted.merging.slots)
        assert torch.equal(told.merging.sizes, counted.merging.sizes)
    assert short_ones([later]) == []


def turn_of(seen: Visibility, old: int, tile_tokens: int, here: float):
    """The columns of a turn, a share of whose tokens is there, behind some of those of `old` tiles; and what the host knows."""
    groups, readable = seen.groups(old), seen.readable_tiles()
    before = torch.rand(len(groups), old) < 0.8
    readable[:, :old] &= before
    there = (torch.rand(*groups.shape, tile_tokens) < here).flatten(1)
    there[:, : old * tile_tokens] &= before.repeat_interleave(tile_tokens, dim=1)
    there[:, -1] = True
    parts, first = [], 0
    for part in (there[:, : old * tile_tokens], there[:, old * tile_tokens :]):
        places = (~part).long().argsort(dim=1, stable=True)[:, : int(part.sum(dim=1).max()) if part.numel() else 0]
        parts.append((places + first, part.gather(1, places)))
        first = part.shape[1]
    index, valid = (torch.cat(both, dim=1) for both in zip(*parts, strict=True))
    tile, ones = index // tile_tokens, torch.ones_like(index)
    group = groups.gather(1, tile).masked_fill(~valid, -1)
    can = readable.gather(1, tile) & valid
    about = Columns(index, valid, ones, group, can, first_new=parts[0][0].shape[1], tile_tokens=tile_tokens)
    counts = there.view(*groups.shape, tile_tokens).sum(dim=2)
    return about, KnownGroups.of(
        Tiles(groups, readable, groups), counts[:, old:], before, counts[:, :old].sum(dim=1).tolist()
    )
