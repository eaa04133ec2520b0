import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trim_plugin.arithmetic import checked_share, tokens_left
from trim_plugin.forward.tower_merging import CLASS, PADDING, PATCH, kinds_of_tokens, merge_alike

PATCHES, TOKENS = 17, 24


def kinds_of(tiles):
    real = torch.arange(4) < torch.tensor(tiles)[:, None]
    return kinds_of_tokens(real, PATCHES, 4 * TOKENS)


@pytest.mark.parametrize("tiles", [1, 2, 3, 4])
def test_kinds_tile_by_tile(tiles):
    for number, tile in enumerate(kinds_of([tiles])[0].view(4, TOKENS).tolist()):
        real = [CLASS] + [PATCH] * (PATCHES - 1) + [PADDING] * (TOKENS - PATCHES)
        assert tile == (real if number < tiles else [PADDING] * TOKENS)


@given(
    tiles=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    share=st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.75, 0.99]),
    seed=st.integers(0, 1000),
)
def test_only_tokens_of_a_kind_are_merged_and_as_many_are_left_as_counted(tiles, share, seed):
    kinds = kinds_of(tiles)
    states = torch.randn(*kinds.shape, 8, generator=torch.Generator().manual_seed(seed))
    merging, positions, valid = merge_alike(states, kinds, share)
    representatives = positions.gather(1, merging.slots)
    assert torch.equal(kinds.gather(1, representatives), kinds)
    for number, count in enumerate(tiles):
        assert int(valid[number].sum()) == tokens_left(count, 4, PATCHES, 4 * TOKENS, share)
        patches = (kinds[number, positions[number, valid[number]]] == PATCH).sum()
        assert int(patches) == math.ceil(share * count * (PATCHES - 1) - 1e-9)
    assert bool((merging.sizes.gather(1, merging.slots)[kinds == CLASS] == 1).all())
    assert (merging.sizes * valid).sum(dim=1).tolist() == [4 * TOKENS] * len(tiles)


def test_a_picture_without_a_real_tile_is_padding_alone():
    kinds = kinds_of([0])
    merging, _, valid = merge_alike(torch.randn(1, 4 * TOKENS, 8), kinds, 0.5)
    assert int(valid.sum()) == 12
    assert int(merging.sizes.sum()) == 4 * TOKENS


@pytest.mark.parametrize("value", [0, -1, 1.5, "half", True, float("nan")])
def test_bad_shares(value):
    with pytest.raises(ValueError, match=r"tower_share must be a number in \(0, 1\]"):
        checked_share(value)
