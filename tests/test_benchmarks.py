import argparse
import json
import math

import numpy as np
import pytest
import torch

from benchmarks import report
from benchmarks.common.decoding import Decoding, stock_cache
from benchmarks.common.given_share import EvenlySpaced
from benchmarks.common.intervals import bootstrap, median_interval, spread
from benchmarks.common.models import load_shape
from benchmarks.common.results import environment, write_result
from benchmarks.common.scenarios import SCENARIOS, scenario_inputs
from benchmarks.latency import measure as latency
from benchmarks.latency import report as latency_report
from benchmarks.memory import measure as memory
from benchmarks.quality import measure as quality
from benchmarks.quality import report as quality_report
from benchmarks.quality import rules
from trim_plugin import TopKPerHead, TrimmedCache
from trim_plugin.embedded import SMALL_MODEL

from .random_models import Sample, random_inputs, random_model, trimmed

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
trained = pytest.mark.skipif(not SMALL_MODEL.exists(), reason="the small model is not there")


@pytest.fixture
def small():
    return load_shape("small", torch.float32)


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


def test_the_change_at_a_share_lies_between_the_nearest_settings():
    rows = [{"kept_share": 0.4, "change": 0.0}, {"kept_share": 0.2, "change": -0.1}]
    assert quality_report.change_at(rows, 0.3) == -0.05
    assert quality_report.change_at(rows, 0.5) is None


@trained
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


@trained
def test_decoding_equals_generate(small):
    inputs = scenario_inputs(small, SCENARIOS["page"], 1)
    expected = small.generate(**inputs, max_new_tokens=5, do_sample=False)[0, -5:]
    decoding = Decoding(small, inputs, stock_cache(small))
    found = torch.cat([decoding.prefill(), *(decoding.step() for _ in range(4))], dim=1)
    assert found[0].tolist() == expected.tolist()


@trained
def test_latency_of_a_scenario(small):
    case = latency.measure(small, "small", "photo", 1, 4, 1, latency.FEW_WAYS, "cpu")
    rows = {row["way"]: row for row in case["rows"]}
    assert rows["exact"]["cross_kv"] * 4 == rows["stock"]["cross_kv"]
    assert rows["kept 0.25"]["roofline_ratio"] < rows["exact"]["roofline_ratio"] < 1
    assert rows["stock"]["step_ratio"]["median"] == 1
    cost = latency.scoring_cost(small, "small", "cpu", 1)
    assert cost["scratch_bytes"] < 64 * 2**20


@trained
def test_memory_of_a_case_and_its_plan(small):
    case = memory.Case("small", "photo", 1, "float32", False, "exact")
    row = memory.with_plan(memory.measure(small, case, "cpu"))
    assert row["planned"]["cross_kv_error"] == 0
    assert abs(row["planned"]["weights_error"]) < 0.01
    stock = memory.with_plan(
        memory.measure(small, memory.Case("small", "photo", 1, "float32", False, "stock static"), "cpu")
    )
    assert stock["planned"]["cross_kv_error"] == 0
    assert stock["cross_kv"] == 4 * row["cross_kv"]


def test_memory_cases_are_unique_and_cover_what_was_asked():
    arguments = argparse.Namespace(shapes=["small", "11b-layers"], quick=False, batches=[2])
    cases = memory.cases(arguments)
    assert len(cases) == len(set(cases))
    assert {case.weights for case in cases} == {"float32", "bfloat16", "int8", "nf4"}
    assert {case.scenario for case in cases} == set(SCENARIOS)


@trained
def test_quality_writes_what_the_report_reads(tmp_path, monkeypatch):
    chosen = [quality.Rule("exact", 1.0, {"top_k_ratio": 1.0}), quality.Rule("paper", 0.1, {"top_k_ratio": 0.1})]
    monkeypatch.setattr(quality, "all_rules", lambda quick: chosen)
    monkeypatch.setattr(quality, "conditions", lambda adapter: {})
    result = quality.run(argparse.Namespace(scenes=4, quick=False, out=tmp_path, adapter=None))
    exact, paper = result["rows"][1:]
    assert exact["agreement"] == 1.0
    assert exact["change"] == 0.0
    assert 0 < paper["kept_share"] < 1
    assert result["questions"] == 20
    as_many, half = result["equal_tokens"][:2]
    assert half["kept_share"] < as_many["kept_share"] < 1
    page, plot = report.write(tmp_path, tmp_path / "docs")
    text = page.read_text(encoding="utf-8")
    assert "| paper | 0.1 |" in text
    assert plot.stat().st_size < 200_000
    report.write(tmp_path, tmp_path / "docs")
    assert page.read_text(encoding="utf-8") == text


def test_reports_leave_the_text_around_the_markers_alone(tmp_path):
    row = {
        "way": "stock",
        "step_ratio_interval": [1, 1],
        "roofline_share": 1.0,
        "roofline_ratio": 1.0,
        "tokens_per_second": 5.0,
    }
    row |= {
        name: {"median": 1.0, "low": 1.0, "high": 1.0}
        for name in ("step_ratio", "step_seconds", "prefill_seconds", "prefill_ratio")
    }
    case = {"shape": "small", "scenario": "page", "batch": 1, "rows": [row, row | {"way": "stock again"}]}
    result = {
        "environment": environment(),
        "quick": True,
        "dtype": {"small": "float32"},
        "rows": [case],
        "scoring": [],
    }
    write_result("latency", json.loads(json.dumps(result)), tmp_path)
    (tmp_path / "benchmarks.md").write_text(
        "before\n<!-- begin latency -->\nold\n<!-- end latency -->\nafter\n", encoding="utf-8"
    )
    report.write(tmp_path, tmp_path)
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "one document page" in text


@pytest.mark.parametrize(("exact", "slower"), [([0.98, 1.01], False), ([1.03, 1.05], False), ([1.05, 1.08], True)])
def test_slower_means_beyond_the_noise(exact, slower):
    rows = [{"way": "stock again", "step_ratio_interval": [0.97, 1.04]}, {"way": "exact", "step_ratio_interval": exact}]
    assert latency_report.slower_than_stock({"rows": rows}) is slower


def test_the_smallest_share_stops_at_the_first_loss():
    rows = [
        {"rule": "r", "kept_share": share, "change": change}
        for share, change in ((0.2, 0.0), (0.4, -0.01), (0.6, -0.004))
    ]
    assert quality.smallest_share(rows, "r") == 0.6
    assert quality.smallest_share(rows, "other") is None


def test_intervals():
    samples = np.random.default_rng(0).normal(size=(400, 1))
    low, high = bootstrap(samples, lambda rows: rows.mean())
    assert low < samples.mean() < high
    assert median_interval([float(n) for n in range(101)]) == (40.0, 60.0)
    assert spread([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
