import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trim_plugin.selection.visibility import Visibility, of_additive, of_tiles, padding_of

LOW = torch.finfo(torch.float32).min


def additive(rows):
    """Rows of 0/1 into the mask and open_rows that transformers makes."""
    allowed = torch.tensor(rows, dtype=torch.bool)[None, None]
    open_rows = allowed.any(-1, keepdim=True).float()
    return torch.zeros(allowed.shape).masked_fill(~allowed, LOW) * open_rows, open_rows


def seen(rows, padding=None):
    rows = torch.tensor(rows, dtype=torch.bool)
    padding = torch.zeros(rows.shape[:2], dtype=torch.bool) if padding is None else torch.tensor(padding)
    return Visibility(rows, padding)


def test_query_rows_read_something_and_are_not_padding():
    rows = [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1]]
    padding = torch.tensor([[False, False, True]])
    tiles = torch.tensor(rows).view(1, 3, 2, 2)
    for found in (of_tiles(tiles, padding), of_additive(*additive(rows), padding)):
        assert found.open[0].int().tolist() == rows
        assert found.query_rows.tolist() == [[False, True, False]]
        assert found.readable_tiles(exact=True).int().tolist() == [[1, 1, 0, 1]]


def test_a_fully_masked_last_row_reads_everything():
    assert of_additive(*additive([[1, 0], [0, 0]]), None).readable_tiles().tolist() == [[True, True]]


def test_padding_behind_the_text_does_not_say_what_is_readable():
    found = seen([[[1, 0], [1, 1]], [[0, 1], [1, 1]]], [[False, True], [True, True]])
    assert found.readable_tiles().tolist() == [[True, False], [True, True]]
    assert found.readable_tiles(exact=True).tolist() == [[True, True], [True, True]]
    second = torch.tensor([[False, True], [False, False]])
    assert not found.reads_any(second)
    assert found.reads_any(second, exact=True)


def test_groups_are_what_the_same_query_rows_read():
    rows = [[[1, 1, 0], [1, 0, 1], [1, 1, 0]]]
    assert seen(rows, [[False, False, True]]).groups().tolist() == [[0, 1, 2]]
    assert seen(rows, [[True, False, True]]).groups().tolist() == [[0, -1, 0]]


def test_tiles_of_earlier_turns_belong_to_no_group():
    rows = [[[1, 1, 1, 0], [1, 1, 1, 1]]]
    assert seen(rows).groups(first=1).tolist() == [[-1, 0, 0, 1]]
    assert seen(rows).groups(first=4).tolist() == [[-1] * 4]


def test_a_sample_without_query_rows_has_no_group():
    assert seen([[[0, 0], [0, 0]]]).groups().tolist() == [[-1, -1]]


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(0, 999))
def test_groups_against_a_restatement(batch, rows, tiles, number):
    generator = torch.Generator().manual_seed(number)
    found = Visibility(
        torch.rand(batch, rows, tiles, generator=generator) < 0.5,
        torch.rand(batch, rows, generator=generator) < 0.2,
    )
    for sample, groups in enumerate(found.groups().tolist()):
        readers = [
            tuple(row for row in range(rows) if found.query_rows[sample, row] and found.open[sample, row, tile])
            for tile in range(tiles)
        ]
        patterns = list(dict.fromkeys(pattern for pattern in readers if pattern))
        assert groups == [patterns.index(pattern) if pattern else -1 for pattern in readers]


def masks_of(flat, past=0):
    """Every kind of mask that a text model can be given, of texts of which `flat` tells 0 for padding, `past` tokens cached."""
    keys = flat != 0
    causal = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool).tril() & keys[:, None]
    causal = causal[:, None, past:]
    longer = torch.nn.functional.pad(causal, (0, 4))  # a static cache's
    return {
        "flat": flat,
        "flat bool": keys,
        "bool": causal,
        "additive": torch.zeros(causal.shape).masked_fill(~causal, LOW),
        "-inf": torch.zeros(causal.shape).masked_fill(~causal, -torch.inf),
        "of heads": causal.expand(-1, 3, -1, -1),
        "longer": longer,
        "longer and flat": torch.nn.functional.pad(flat, (0, 4)),
    }


@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize(
    "flat",
    [
        [[1, 1, 1, 1, 1]],
        [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
        [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
        [[1, 1, 1, 0, 0]],
        [[0, 1, 1, 1, 0], [1, 1, 0, 0, 1]],
        [[0, 0, 0, 0, 1]],
    ],
)
def test_padding_from_every_kind_of_mask(flat, past):
    flat = torch.tensor(flat)
    expected = (flat == 0)[:, past:].tolist()
    for kind, mask in masks_of(flat, past).items():
        assert padding_of(mask, past, 5 - past).tolist() == expected, kind
    assert padding_of(None, past, 5 - past) is None
    assert padding_of(flat[:, past:], past, 5 - past).tolist() == expected, "of the new tokens alone"


def test_padding_that_sees_itself_alone():
    """As one makes masks by hand, so that no row of a softmax is empty."""
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    keys = torch.tensor([False, False, True, True])
    assert padding_of(((causal & keys) | torch.eye(4).bool())[None, None], 0, 4).tolist() == [
        [True, True, False, False]
    ]
    assert padding_of(torch.ones(1, 1, 1, 1), 0, 1).tolist() == [[False]]


def test_texts_packed_into_one_row_are_text():
    segment = torch.tensor([0, 0, 0, 1, 1])
    mask = (segment[:, None] == segment) & torch.ones(5, 5, dtype=torch.bool).tril()
    assert padding_of(mask[None, None], 0, 5).tolist() == [[False] * 5]


@pytest.mark.parametrize(("mask", "kind"), [("flex", "type str"), (torch.ones(2, 3, 3), r"shape \(2, 3, 3\)")])
def test_other_masks_are_refused(mask, kind):
    with pytest.raises(TypeError, match=f"attention mask of {kind}"):
        padding_of(mask, 0, 3)
