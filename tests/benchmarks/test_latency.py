import pytest

from benchmarks.latency import measure as latency
from benchmarks.latency import report as latency_report


def test_latency_of_a_scenario(small):
    case = latency.measure(small, "small", "photo", 1, 4, 1, latency.FEW_WAYS, "cpu")
    rows = {row["way"]: row for row in case["rows"]}
    assert rows["exact"]["cross_kv"] * 4 == rows["stock"]["cross_kv"]
    assert rows["kept 0.25"]["roofline_ratio"] < rows["exact"]["roofline_ratio"] < 1
    assert rows["stock"]["step_ratio"]["median"] == 1
    cost = latency.scoring_cost(small, "small", "cpu", 1)
    assert cost["scratch_bytes"] < 64 * 2**20


@pytest.mark.parametrize(("exact", "slower"), [([0.98, 1.01], False), ([1.03, 1.05], False), ([1.05, 1.08], True)])
def test_slower_means_beyond_the_noise(exact, slower):
    rows = [{"way": "stock again", "step_ratio_interval": [0.97, 1.04]}, {"way": "exact", "step_ratio_interval": exact}]
    assert latency_report.slower_than_stock({"rows": rows}) is slower
