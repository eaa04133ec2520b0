import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trim_plugin.selection import visibility as masks

LOW = torch.finfo(torch.float32).min


def test_open_is_what_lies_above_half_the_minimum():
    mask = torch.tensor([0.0, -5.0, LOW, LOW + 1, -math.inf])
    assert masks.is_open(mask).tolist() == [True, True, False, False, False]


def test_columns_are_taken_sample_by_sample_and_padding_is_closed():
    mask = torch.arange(12.0).view(2, 1, 2, 3)
    taken = masks.take_columns(mask, torch.tensor([[2, 0], [1, 1]]), torch.tensor([[True, True], [True, False]]))
    assert taken[0, 0].tolist() == [[2.0, 0.0], [5.0, 3.0]]
    assert taken[1, 0].tolist() == [[7.0, LOW], [10.0, LOW]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_open_mask_closes_padding_alone(dtype):
    mask = masks.open_mask(torch.tensor([[True, False, True]]), 2, dtype)
    assert mask.shape == (1, 1, 2, 3)
    assert mask.dtype == dtype
    assert masks.is_open(mask)[0, 0].tolist() == [[True, False, True]] * 2


def test_a_mask_of_another_width_is_refused():
    masks.check_columns(torch.zeros(1, 1, 1, 5), 5)
    with pytest.raises(ValueError, match="covers 5 visual tokens, but the pictures of this conversation are 6"):
        masks.check_columns(torch.zeros(1, 1, 1, 5), 6)


@given(
    st.integers(1, 9).flatmap(
        lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=4)
    ),
    st.none() | st.integers(0, 5),
)
def test_packing_keeps_every_chosen_position_in_order(rows, more):
    chosen = torch.tensor(rows)
    longest = int(chosen.sum(1).max())
    positions, valid = masks.pack(chosen, None if more is None else longest + more)
    assert positions.shape == valid.shape
    assert positions.shape[1] == longest + (more or 0)
    assert ((positions >= 0) & (positions < chosen.shape[1])).all()  # padding points at something, too
    for row in range(len(rows)):
        assert positions[row][valid[row]].tolist() == chosen[row].nonzero().flatten().tolist()
        assert valid[row].tolist() == sorted(valid[row].tolist(), reverse=True)
