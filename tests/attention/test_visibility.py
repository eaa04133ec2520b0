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


def test_padding_from_every_kind_of_mask():
    expected = [[True, False, False], [False, False, False]]
    flat = torch.tensor([[0, 1, 1], [1, 1, 1]])
    causal = torch.ones(3, 3, dtype=torch.bool).tril() & (flat != 0)[:, None]
    additive_mask = torch.zeros(causal.shape).masked_fill(~causal, LOW)
    longer = torch.cat([causal, torch.zeros(2, 3, 4, dtype=torch.bool)], dim=2)  # a static cache's
    for mask in (flat, causal[:, None], additive_mask[:, None], longer[:, None]):
        assert padding_of(mask, 3).tolist() == expected
    assert padding_of(None, 3) is None
    with_past = torch.cat([torch.ones(2, 3, 2, dtype=torch.bool), causal], dim=2)
    assert padding_of(with_past[:, None], 3).tolist() == expected


def test_other_masks_are_refused():
    with pytest.raises(TypeError, match="attention mask of type str"):
        padding_of("flex", 3)
