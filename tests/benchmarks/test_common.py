import numpy as np
import pytest
import torch

from benchmarks.common.decoding import Decoding, stock_cache
from benchmarks.common.intervals import bootstrap, median_interval, spread
from benchmarks.common.scenarios import SCENARIOS, scenario_inputs
from trim_plugin import TrimmedCache


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_scenarios_are_what_they_say(name, small):
    scenario = SCENARIOS[name]
    if scenario.images > 8:
        pytest.skip("slow")
    inputs = scenario_inputs(small, scenario, 2)
    cache = TrimmedCache(small, {"top_k_ratio": 1.0})
    decoding = Decoding(small, inputs, cache)
    assert decoding.prefill().shape == decoding.step().shape == (2, 1)
    assert len(cache.kept_indices[0]) == scenario.readable * scenario.tiles * 65


def test_decoding_equals_generate(small):
    inputs = scenario_inputs(small, SCENARIOS["page"], 1)
    expected = small.generate(**inputs, max_new_tokens=5, do_sample=False)[0, -5:]
    decoding = Decoding(small, inputs, stock_cache(small))
    found = torch.cat([decoding.prefill(), *(decoding.step() for _ in range(4))], dim=1)
    assert found[0].tolist() == expected.tolist()


def test_intervals():
    samples = np.random.default_rng(0).normal(size=(400, 1))
    low, high = bootstrap(samples, lambda rows: rows.mean())
    assert low < samples.mean() < high
    assert median_interval([float(n) for n in range(101)]) == (40.0, 60.0)
    assert spread([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
