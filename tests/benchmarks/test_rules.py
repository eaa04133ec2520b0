import math

import pytest
import torch

from benchmarks.common.given_share import EvenlySpaced
from benchmarks.quality import rules
from trim_plugin.compat import cache_of

from ..random_models import Sample, random_inputs, random_model, trimmed

SHARED_RULES = [rules.RandomTokens, EvenlySpaced]


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


def held(context, merge=True):
    model = random_model(seed=3, image_size=16)
    inputs = random_inputs(model, [Sample((1, (6,), 6)), Sample((1, (2,), 3))])
    with context():
        cache = cache_of(trimmed(model, inputs, {"top_k_ratio": 0.1, "merge": merge}, 1))
    keys = cache.layers[cache.cross_layers[0]].keys
    lengths = torch.tensor([len(kept) for kept in cache.kept_indices])
    real = torch.arange(keys.shape[2]) < lengths[:, None]  # padding between the samples may hold anything
    return keys * real[:, None, :, None], cache


def test_log_size_only_keeps_the_tokens_as_they_are_and_their_sizes():
    whole, dropped = held(rules.contextlib.nullcontext), held(rules.contextlib.nullcontext, merge=False)
    own, cache = held(rules.log_size_only)
    torch.testing.assert_close(own, dropped[0])
    assert not torch.allclose(own, whole[0])
    assert [sizes.tolist() for sizes in cache.kept_sizes] == [sizes.tolist() for sizes in whole[1].kept_sizes]


def test_mean_only_takes_the_means_and_no_sizes():
    whole = held(rules.contextlib.nullcontext)
    means, cache = held(rules.mean_only)
    torch.testing.assert_close(means, whole[0])
    assert all(int(sizes.max()) == 1 for sizes in cache.kept_sizes)
