import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trim_plugin.attention import masks

LOW = torch.finfo(torch.float32).min


def test_open_is_what_lies_above_half_the_minimum():
    mask = torch.tensor([0.0, -5.0, LOW, LOW + 1, -math.inf])
    assert masks.is_open(mask).tolist() == [True, True, False, False, False]


def test_the_last_row_alone_says_what_decoding_reads():
    mask = torch.tensor([[[[0.0, LOW, LOW], [LOW, 0.0, LOW]]]])
    assert masks.last_row_reads(mask).tolist() == [[False, True, False]]


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


def test_blind_rows_read_nothing_though_their_mask_is_open():
    mask = torch.tensor([[[[0.0, 0.0], [0.0, LOW]]]])  # the first row is blind
    open_rows = torch.tensor([[[[0.0], [1.0]]]])
    second = torch.tensor([[False, True]])
    assert bool(masks.reads_any(mask, None, second))
    assert not bool(masks.reads_any(mask, open_rows, second))
    assert bool(masks.reads_any(mask, open_rows, torch.tensor([[True, False]])))
    assert not bool(masks.reads_any(mask[..., 1:], open_rows, torch.tensor([[False]])))


@given(
    st.integers(1, 9).flatmap(
        lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=4)
    ),
    st.integers(1, 5),
)
def test_packing_keeps_every_chosen_position_in_order(rows, multiple):
    chosen = torch.tensor(rows)
    positions, valid = masks.pack(chosen, multiple)
    assert positions.shape == valid.shape
    assert positions.shape[1] % multiple == 0
    assert positions.shape[1] - int(chosen.sum(1).max()) < multiple
    assert ((positions >= 0) & (positions < chosen.shape[1])).all()  # padding points at something, too
    for row in range(len(rows)):
        assert positions[row][valid[row]].tolist() == chosen[row].nonzero().flatten().tolist()
        assert valid[row].tolist() == sorted(valid[row].tolist(), reverse=True)
