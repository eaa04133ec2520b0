"""How many pictures go through one `generate`."""

from __future__ import annotations

import pytest
import torch

from trim_plugin.batching import sizing
from trim_plugin.config import TrimConfig

GIB = 2**30


class Large:
    """The 11B model as the planner sees it: no weights."""

    dtype = torch.bfloat16

    def __init__(self, device="cuda"):
        from trim_plugin.planning.model_sizes import built_in_config

        self.config, self.device = built_in_config("11b"), torch.device(device)


@pytest.fixture
def memory(monkeypatch):
    def say(free):
        monkeypatch.setattr(sizing, "free_memory", lambda device: free)

    return say


def pictures(config=None, model=None):
    return sizing.pictures_at_a_time(model or Large(), config or TrimConfig(), new_tokens=64)


def test_grows_with_the_memory_at_hand_up_to_where_more_gains_nothing(memory):
    found = []
    for free in (1 * GIB, 5 * GIB, 20 * GIB, 4000 * GIB):
        memory(free)
        found.append(pictures())
    assert found[0] == 1
    assert found == sorted(found)
    assert len(set(found)) == 4
    assert found[-1] == sizing.MOST_PICTURES["other"]


def test_never_more_than_fits_by_the_planner(memory):
    from trim_plugin.planning.job import Job
    from trim_plugin.planning.planner import plan, ways

    memory(30 * GIB)
    for config in (TrimConfig(), TrimConfig(prefill_pictures=30)):
        found = pictures(config)
        way = ways((config.top_k_ratio,), prefill_pictures=config.prefill_pictures)[2]
        trimmed = plan(Large().config, Job(batch=found, prompt_tokens=256, new_tokens=64), way)
        assert 1 < found < sizing.MOST_PICTURES["other"]
        assert trimmed.peak - trimmed.weights_total <= 30 * GIB


def test_fewer_without_trimming_more_with_small_formats(memory):
    memory(30 * GIB)
    assert pictures(TrimConfig(top_k_ratio=1.0)) <= pictures() <= pictures(TrimConfig(kv_quantization="nf4"))


def test_a_cpu_gains_little_from_large_batches(memory):
    memory(4000 * GIB)
    assert pictures(model=Large("cpu")) == sizing.MOST_PICTURES["cpu"]


def test_the_host_s_memory_is_what_is_left_of_it():
    import psutil

    free = sizing.free_memory(torch.device("cpu"))
    assert 0 < free <= psutil.virtual_memory().total
