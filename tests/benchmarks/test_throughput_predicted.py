"""What many at once means for 11B: by hand, from the planner's bytes and the counts of a step."""

import argparse

import pytest

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.common.results import RESULTS, read_result
from benchmarks.throughput import measure, predicted
from trim_plugin.planning.configuration import built_in_config
from trim_plugin.planning.model_sizes import weight_bytes


@pytest.fixture(scope="module")
def rows():
    found = predicted.predict(read_result("predicted", RESULTS))["rows"]
    return {(row["memory_gib"], row["way"]): row for row in found}


def test_requests_that_fit_are_those_of_the_bytes(rows):
    """8 of 40 layers hold visual tokens, 32 text; 2 × 1024 numbers of 2 bytes a token and layer."""
    for (memory, way), row in rows.items():
        kept = {"kept 0.25": 1601, "kept 0.1": 641}.get(way, 6404)
        assert row["request_bytes"] == 4096 * (8 * kept + 32 * 255)
        free = 0.7 * (memory * 2**30 - sum(weight_bytes(built_in_config("11b"), row["weights"]).values()))
        assert row["fit"] == int(free // row["request_bytes"])


def test_tokens_a_second(rows):
    for (memory, way), row in rows.items():
        bandwidth, speed = {24: (1e12, 165e12), 80: (3e12, 400e12)}[memory]
        kept = {"kept 0.25": 1601, "kept 0.1": 641}.get(way, 6404)
        weights = 18.5e9 if memory == 80 else 5.55e9 + 2 * 17.45e9
        held = row["fit"] * 4096 * (8 * kept + 32 * 192)
        step = (
            (0 if way == predicted.SGLANG else 1620 * 4e-6) + (weights + held) / bandwidth + row["fit"] * 18.5e9 / speed
        )
        assert row["step_seconds"] == pytest.approx(step, rel=0.01)
        whole = row["fit"] * 128 / (row["fit"] * row["prefill_seconds"] + 128 * row["step_seconds"])
        assert row["tokens_a_second"] == pytest.approx(whole)


def test_nothing_is_said_in_our_favour(rows):
    for memory in (24, 80):
        exact, beside = rows[memory, "exact"], rows[memory, predicted.SGLANG]
        assert exact["fit"] == beside["fit"]
        assert exact["tokens_a_second"] < beside["tokens_a_second"]


def test_it_is_written_and_reported_without_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "load_small_model", lambda **_: pytest.fail("measures"))
    main(["throughput", "--predicted", "--out", str(tmp_path), "--docs", str(tmp_path / "docs")])
    (page,) = (tmp_path / "docs").rglob("throughput_predicted.md")
    assert "**Predicted, not measured.**" in page.read_text(encoding="utf-8")
    assert "| kept 0.1 |" in page.read_text(encoding="utf-8")
    assert measure.run(argparse.Namespace(out=tmp_path, predicted=True))["rows"]
    assert report.at_hand(tmp_path).keys() == {"throughput_predicted"}
