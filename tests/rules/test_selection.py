import pytest
import torch

from trim_plugin import TopKPerHead, VisualTokenProcessorList
from trim_plugin.attention.visibility import Visibility
from trim_plugin.rules.selection import select

INF = float("inf")


def two_groups():
    """Sample 0 reads tokens 0–2 and 3–5 with different rows; sample 1 reads all six together; sample 2 is without image."""
    runs = torch.tensor([[[1, 0], [0, 1]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]], dtype=torch.bool)
    return Visibility(runs, runs.any(-1), torch.tensor([3, 3]))


def test_every_group_keeps_its_best_and_imageless_samples_keep_all():
    scores = torch.tensor([[[9, 8, 7, 1, 2, 3.0]], [[9, 8, 7, 1, 2, 3.0]], [[-INF] * 6]])
    kept = select(scores, two_groups(), VisualTokenProcessorList([TopKPerHead(0.3)]))
    assert kept.int().tolist() == [[1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0], [1] * 6]


def test_processors_see_one_group_at_a_time():
    calls = []

    def watch(scores, visible):
        calls.append((scores.clone(), visible.int().tolist()))
        return scores

    select(torch.rand(3, 2, 6), two_groups(), VisualTokenProcessorList([watch]))
    assert [visible for _, visible in calls] == [[[1, 1, 1, 0, 0, 0], [1] * 6], [[0, 0, 0, 1, 1, 1]]]
    for scores, visible in calls:
        assert torch.equal(scores.isinf().any(1), torch.tensor(visible) == 0)


def test_the_union_over_heads_survives():
    seen = Visibility(torch.ones(1, 1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool), torch.tensor([4]))
    scores = torch.tensor([[[4, 1, 1, 1.0], [1, 1, 4, 1.0]]])
    assert select(scores, seen, VisualTokenProcessorList([TopKPerHead(0.25)])).int().tolist() == [[1, 0, 1, 0]]


def test_tokens_of_earlier_turns_stay():
    seen = Visibility(torch.ones(1, 1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool), torch.tensor([5]))
    kept = select(
        torch.tensor([[[0, 0, 9, 1, 2.0]]]), seen, VisualTokenProcessorList([TopKPerHead(0.3)]), first_token=2
    )
    assert kept.int().tolist() == [[1, 1, 1, 0, 0]]


def test_an_emptied_group_is_an_error_that_names_it():
    def drop_later(scores, visible):
        return scores.masked_fill(torch.arange(6) >= 3, -INF)

    with pytest.raises(ValueError, match="removed every visual token of visibility group 1 in sample 0"):
        select(torch.rand(3, 2, 6), two_groups(), VisualTokenProcessorList([drop_later]))
