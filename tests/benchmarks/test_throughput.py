"""Throughput: a short run is written and reported, with every way and every length."""

import argparse

from benchmarks import report
from benchmarks.throughput import measure as benchmark


def test_a_short_run_is_written_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "LONGEST", 6)
    result = benchmark.run(argparse.Namespace(device="cpu", quick=True, out=tmp_path, turns=1))
    assert [row["way"] for row in result["rows"]][:2] == ["one by one", "static 16"]
    assert set(result["lengths"]) <= set(range(1, 7))
    assert all(row["tokens_a_second"] >= row["requests_a_second"] > 0 for row in result["rows"])
    pages = report.write(tmp_path, tmp_path / "docs")
    assert any("| engine 32 |" in page.read_text(encoding="utf-8") for page in pages if page.suffix == ".md")


def test_requests_are_drawn_once():
    first, again = benchmark.requests(9), benchmark.requests(9)
    assert [(question, picture.tobytes(), length) for question, picture, length in first] == [
        (question, picture.tobytes(), length) for question, picture, length in again
    ]
