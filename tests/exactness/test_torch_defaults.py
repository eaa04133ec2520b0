"""A program's own default device and dtype: what the package makes on the way lies where it has to, in full precision."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch

from trim_plugin import KCenter, TrimmedCache
from trim_plugin.compat import CACHE
from trim_plugin.selection import k_center, rounds

from ..random_models import PAIR, random_inputs, random_model, trimmed

QUANTIZES = importlib.util.find_spec("bitsandbytes") is not None
RULES = {
    "default": None,
    "exact": {"top_k_ratio": 1.0},
    "the paper's": {"top_k_ratio": 0.2, "merge": False},
    "radius": {"processors": [KCenter(radius=0.2)]},
    "tower": {"tower_share": 0.5},
    "in pieces": {"prefill_pictures": 1},
    **({"int8": {"kv_quantization": "int8"}} if QUANTIZES else {}),
}


@pytest.fixture(scope="module")
def model():
    return random_model(image_size=16)


@pytest.fixture(autouse=True)
def own_tables():
    """Tables that are made once are made within the test, and not left to others."""
    forget_tables()
    yield
    forget_tables()


def forget_tables():
    for made in (*vars(k_center).values(), *vars(rounds).values()):
        if hasattr(made, "cache_clear"):
            made.cache_clear()


@pytest.mark.parametrize("rule", RULES)
def test_a_default_device_changes_nothing(model, rule):
    inputs = random_inputs(model, PAIR)
    before = trimmed(model, inputs, RULES[rule], new=3)
    fresh = copy.deepcopy(model)
    with torch.device("meta"):  # as torch.set_default_device("cuda") is: what says no device does not land on the CPU
        within = trimmed(fresh, inputs, RULES[rule], new=3)
    assert torch.equal(within.sequences, before.sequences)


def test_a_cache_is_looked_at_and_changed_under_a_default_device(model):
    inputs, cache, empty = random_inputs(model, PAIR), TrimmedCache(model), TrimmedCache(model)
    first, repeated = torch.tensor([0]), torch.ones(1, dtype=torch.long)
    with torch.device("meta"), torch.no_grad():
        model(**inputs, **{CACHE: cache}, use_cache=True)
        model(input_ids=inputs["input_ids"][:, -2:], **{CACHE: empty}, use_cache=True)
        cache.batch_select_indices(first)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(repeated)
    assert str(cache.report())
    assert [len(kept) for kept in empty.kept_indices] == [0, 0]
    assert {kept.device.type for kept in (*cache.kept_indices, *empty.kept_indices)} == {"cpu"}


@pytest.mark.parametrize("tokens", [60, 1300])  # one by one, and in rounds
@pytest.mark.parametrize("rule", [KCenter(0.35), KCenter(radius=0.3)], ids=str)
def test_k_center_under_a_default_dtype(tokens, rule):
    states = torch.randn(1, tokens, 300, generator=torch.Generator().manual_seed(0))
    members = torch.ones(1, tokens, dtype=torch.bool)
    torch.set_default_dtype(torch.bfloat16)
    try:
        chosen = rule.choose(states, members)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(rule.choose(states, members), chosen)
    forget_tables()
    assert torch.equal(rule.choose(states, members), chosen)
