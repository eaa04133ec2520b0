"""The tower on fewer patches: its counted arithmetic is what torch counts, and a tiny run is reported."""

import argparse

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report
from benchmarks.common.arithmetic import tower_operations
from benchmarks.latency import tower as benchmark
from trim_plugin.forward import tower_merging


@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize("share", [None, 0.5])
def test_the_arithmetic_is_what_torch_counts(tiles, share, monkeypatch):
    tower = benchmark.load_tower("tiny", torch.float32, "cpu")
    tower.set_attn_implementation("eager")  # of which every product is counted
    inputs = benchmark.pictures(tower, tiles)
    reduce, uncounted = tower_merging.TowerCall.reduce, []

    def counted_apart(*given):  # choosing is not part of what is counted
        before = counted.get_total_flops()
        result = reduce(*given)
        uncounted.append(counted.get_total_flops() - before)
        return result

    monkeypatch.setattr(tower_merging.TowerCall, "reduce", counted_apart)
    with FlopCounterMode(display=False) as counted:
        benchmark.call(tower, inputs, share)
    expected = tower_operations(tower.config, tiles, share)
    made_mask = 2 * tower.config.max_num_tiles**2 * 24**2  # a product of a column and a row
    assert counted.get_total_flops() - sum(uncounted) - made_mask == expected


@pytest.mark.slow
def test_a_tiny_run_is_written_and_reported(tmp_path):
    arguments = argparse.Namespace(
        device="cpu", quick=True, out=tmp_path, tower_dtype="float32", tower_turns=1, tower_shape="tiny"
    )
    result = benchmark.run(arguments)
    assert [(row["tiles"], row["way"]) for row in result["rows"]] == [
        (benchmark.TILES[0], way) for way in benchmark.QUICK_WAYS
    ]
    for row in result["rows"]:
        merged = row["way"] == "share 0.5"
        assert (row["choosing_seconds"]["median"] > 0) == merged
        assert (row["by_arithmetic"] > 1.2) == merged
    pages = report.write(tmp_path, tmp_path / "docs")
    assert any("| share 0.5 |" in page.read_text(encoding="utf-8") for page in pages if page.suffix == ".md")
