import math

import pytest
import torch

from benchmarks.common.given_share import EvenlySpaced
from benchmarks.quality import rules
from trim_plugin import TopKPerHead

from ..random_models import Sample, random_inputs, random_model, trimmed

SHARED_RULES = [
    rules.HeadMean,
    rules.HeadMax,
    rules.BestRank,
    rules.SharpnessWeighted,
    rules.DrawnByScore,
    rules.HalfEven,
    rules.RandomTokens,
    EvenlySpaced,
]


@pytest.mark.parametrize("rule", SHARED_RULES)
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.8])
def test_rules_with_a_budget_keep_that_share_of_every_group(rule, share):
    scores = torch.rand(2, 3, 40)
    visible = torch.zeros(2, 40, dtype=torch.bool)
    visible[0, :40] = True
    visible[1, 10:30] = True
    kept = (rule(share)(scores.masked_fill(~visible[:, None], -math.inf), visible) > -math.inf).any(dim=1)
    assert not (kept & ~visible).any()
    for sample, group in ((0, 40), (1, 20)):
        assert abs(int(kept[sample].sum()) - share * group) <= 1


@pytest.mark.parametrize("rule", SHARED_RULES)
def test_rules_with_a_budget_never_empty_a_group(rule):
    visible = torch.tensor([[False, True, True, False]])
    scores = torch.rand(1, 2, 4).masked_fill(~visible[:, None], -math.inf)
    assert (rule(0.01)(scores, visible) > -math.inf).any()


def test_last_row_votes_only_within_the_context():
    model = random_model(seed=3)
    inputs = random_inputs(model, [Sample((1, (6,), 6)), Sample((2, (2,), 3))])
    seen = []

    def look(scores, visible):
        seen.append(scores)
        return scores

    with rules.last_row_votes():
        trimmed(model, inputs, {"processors": [look]}, 1)
    trimmed(model, inputs, {"processors": [look]}, 1)
    assert not torch.allclose(seen[0], seen[1])
    assert torch.allclose(seen[0][0].exp().sum() * 0 + seen[0][0].clamp(min=0).sum(dim=-1), torch.ones(4))


def test_cells_on_budget_keep_as_many_tokens_as_the_paper_rule():
    scores = torch.rand(3, 4, 40)
    visible = torch.ones(3, 40, dtype=torch.bool)
    visible[1, 7:] = False
    scores.masked_fill_(~visible[:, None], -math.inf)

    def kept(rule):
        return (rule(scores, visible) > -math.inf).any(dim=1).sum(dim=-1)

    paper = kept(TopKPerHead(0.2))
    assert torch.equal(kept(rules.CellsOnBudget(0.2)), paper)
    assert ((kept(rules.CellsOnBudget(0.2, 0.5)) - paper / 2).abs() <= 0.5).all()


def test_value_norms_weigh_the_scores_only_within_the_context():
    model = random_model(seed=3)
    inputs = random_inputs(model, [Sample((1, (6,), 6))])
    seen = []

    def look(scores, visible):
        seen.append(scores)
        return scores

    with rules.value_norms_weigh():
        cache = trimmed(model, inputs, {"processors": [look]}, 1).past_key_values
    trimmed(model, inputs, {"processors": [look]}, 1)
    norms = cache.layers[cache.cross_layers[0]].values.norm(dim=-1).repeat_interleave(2, dim=1)
    visible = seen[1] > -math.inf
    assert torch.allclose(seen[0][visible], (seen[1][visible].view(1, 4, -1) * norms).flatten(), rtol=1e-4)
