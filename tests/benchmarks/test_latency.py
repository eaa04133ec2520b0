import pytest
import torch

from benchmarks.latency import measure as latency
from benchmarks.latency import merging, merging_report
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


def test_merged_against_dropped(small):
    times = merging.eager(small, "photo", 1, 3, "cpu")
    rows = {row["way"]: row for row in merging.against_dropped(times)}
    assert rows["dropped"]["ratio"]["median"] == 1
    assert all(len(seconds) == 3 for seconds in times.values())
    case = {"shape": "small", "scenario": "photo", "batch": 1, "how": "eager", "rows": [*rows.values()]}
    result = {"kept": merging.KEPT, "decoding": [case], "choosing": None}
    assert "| small | one small photo (1 tile) | 1 | eager |" in merging_report.tables(result)


def test_launches_count_work_and_not_views():
    tensor = torch.zeros(4, 8)
    with merging.Launches() as launches:
        tensor.view(8, 4).transpose(0, 1)[:2].add(1.0)
        int(tensor.mul_(2.0)[0, 0])
        tensor.gather(1, torch.zeros(4, 1, dtype=torch.long))
    assert launches.count == {"add": 1, "mul_": 1, "gather": 1, "zeros": 1}
    # Two of 8 values are added to, 32 are doubled in place (read and written), four are gathered, four indices made.
    assert launches.bytes == 2 * 16 * 4 + 2 * 32 * 4 + 2 * 4 * 4 + 4 * 8
