import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.results import environment, read_result
from benchmarks.latency import pieces as latency
from benchmarks.latency import pieces_report as latency_report
from benchmarks.memory import pieces, pieces_report


@pytest.mark.parametrize("way", ["stock", "in pieces", "one at a time"])
def test_a_case_is_measured_and_planned(small, way):
    row = pieces.with_plan(pieces.measure(small, pieces.Case(way, 3), "cpu"), small)
    assert row["peak"] >= row["before"] > 0
    assert row["planned"] > 0
    # A tenth of 260 tokens; stock holds all and says nothing.
    assert row["kept_tokens"] == (None if way == "stock" else 26)


SCRIPT = """
import argparse, json, pathlib, sys, torch
from benchmarks.memory import pieces
model = pieces.load_shape("small", torch.float32)
pieces.load_shape = lambda *_: model
pieces._run(argparse.Namespace(
    shapes=["11b-tower"], device="cpu", batches=[2], quick=True, out=pathlib.Path(sys.argv[1]), limit_gib=0, most=0))
for limit in (2**20, 2**33):
    print(json.dumps(pieces._run_case(model, "cpu", pieces.Case("stock", 24, limit))))
"""


@pytest.mark.slow
def test_the_benchmark_runs_and_a_process_stops_at_its_limit(tmp_path):
    # In a process without a thread pool, as `run` starts it: the cases are forked from there.
    printed = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        check=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
        capture_output=True,
        text=True,
    ).stdout
    rows = read_result("pieces", tmp_path)["rows"]
    assert [(row["way"], row["batch"]) for row in rows] == [("stock", 2), ("in pieces", 2)]
    assert all(row["peak"] >= row["before"] and row["planned"] > 0 for row in rows)
    tight, wide = (json.loads(line) for line in printed.splitlines()[-2:])
    assert tight == {"way": "stock", "batch": 24, "limit": 2**20, "fits": False}
    assert wide["fits"]


@pytest.mark.parametrize(
    ("largest", "most"), [(0, 64), (1, 64), (11, 64), (63, 64), (64, 64), (90, 64), (5, 5), (6, 5)]
)
def test_the_largest_fit_is_found_and_never_above_the_most(largest, most):
    tried = []
    assert pieces.largest_fit(lambda batch: tried.append(batch) or batch <= largest, most) == min(largest, most)
    assert len(tried) == len(set(tried))
    assert max(tried) <= most


def test_the_report_says_ratios_and_what_fits(tmp_path):
    rows = [
        {"way": way, "batch": batch, "limit": None, "fits": True, "before": 0, "peak": peak, "planned": peak // 2}
        for way, batch, peak in (
            ("stock", 16, 1000),
            ("in pieces", 8, 100),
            ("in pieces", 16, 110),
            ("in pieces", 32, 120),
        )
    ]
    result = {
        "shape": "11b-tower",
        "vision_layers": [1, 1],
        "weights": 2**30,
        "kept": 0.1,
        "rows": [*rows, {"way": "stock", "batch": 32, "error": "RuntimeError: no memory"}],
        "limit": 2**30,
        "most": 64,
        "fits": [
            {"way": "stock", "largest": 3, "tried": [[1, True], [4, False]]},
            {"way": "in pieces", "largest": 64, "tried": []},
        ],
    }
    text = pieces_report.tables(json.loads(json.dumps(result)))
    assert "batch 16, in pieces over stock: 0.11" in text
    assert "in pieces, batch 32 over batch 8: 1.20" in text
    assert "16 pages in one call: 1000 B stock, 110 B in pieces (0.11 of it)" in pieces_report.peaks({"pieces": result})
    assert "0.50 … 0.50 of the measured one in 4 cases" in pieces_report.peaks({"pieces": result})
    assert "at least 64" in text
    assert "RuntimeError: no memory" in text
    assert pieces_report.plots(result, tmp_path)[0].is_file()


def test_time_is_measured_in_turns(small):
    case = latency.measure(small, "small", 2, 1, "cpu")
    assert {row["way"]: row["pieces"] for row in case["rows"]} == {
        "whole": 1,
        "whole again": 1,
        "in pieces": 1,
        "one picture at a time": 2,
    }
    assert case["rows"][0]["ratio"]["median"] == 1
    text = latency_report.tables({"rows": [case], "environment": environment()})
    assert "small, batch 2" in text
    assert "(small, 2 to 2 pages)" in latency_report.cost({"pieces_latency": {"rows": [case]}})
