import pytest
import torch

from trim_plugin.attention.visibility import Visibility, padding_of, read_visibility

LOW = torch.finfo(torch.float32).min


def additive(rows):
    """Rows of 0/1 into the mask and open_rows that transformers makes."""
    allowed = torch.tensor(rows, dtype=torch.bool)[None, None]
    open_rows = allowed.any(-1, keepdim=True).float()
    return torch.zeros(allowed.shape).masked_fill(~allowed, LOW) * open_rows, open_rows


def test_reads_runs_and_voters():
    mask, open_rows = additive([[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1]])
    padding = torch.tensor([[False, False, True]])
    seen = read_visibility(mask, open_rows, padding)
    assert seen.lengths.tolist() == [2, 1, 1]
    assert seen.rows[0].tolist() == [[False] * 3, [True, False, False], [True, False, True]]
    assert seen.voters.tolist() == [[False, True, False]]
    assert seen.visible.tolist() == [[True, True, False, False]]


def test_runs_are_joint_over_the_batch():
    first, _ = additive([[1, 1, 1]])
    second, _ = additive([[1, 0, 0]])
    seen = read_visibility(torch.cat([first, second]), None, None)
    assert seen.lengths.tolist() == [1, 2]


def test_groups_are_what_the_same_voters_read():
    runs = torch.tensor([[[True, True, False], [True, False, True], [True, True, False]]])
    voters = torch.tensor([[True, True, False]])
    seen = Visibility(runs, voters, torch.tensor([1, 2, 1]))
    assert [group.int().tolist() for group in seen.groups()[0]] == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    only_second = Visibility(runs, torch.tensor([[False, True, False]]), torch.tensor([1, 2, 1]))
    assert [group.int().tolist() for group in only_second.groups()[0]] == [[1, 0, 0, 1]]


def test_tokens_of_earlier_turns_belong_to_no_group():
    runs = torch.ones(1, 2, 1, dtype=torch.bool)
    seen = Visibility(runs, runs[..., 0], torch.tensor([5]))
    assert [group.int().tolist() for group in seen.groups(first_token=3)[0]] == [[0, 0, 0, 1, 1]]
    assert seen.groups(first_token=5) == [[]]


def test_a_sample_without_voters_has_no_group():
    runs = torch.zeros(1, 2, 1, dtype=torch.bool)
    assert Visibility(runs, runs[..., 0], torch.tensor([5])).groups() == [[]]


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
