"""Reading kept tokens: a short run is written and reported, and what is read is what is held."""

import argparse

from benchmarks import report
from benchmarks.latency import reading as benchmark


def test_a_short_run_is_written_and_reported(tmp_path, monkeypatch):
    small = {"beams": benchmark.Case((12,), 3), "mixed": benchmark.Case((5, 40), 1)}
    monkeypatch.setattr(benchmark, "CASES", small)
    monkeypatch.setattr(benchmark, "TOKENS", 48)
    result = benchmark.run(argparse.Namespace(device="cpu", quick=True, out=tmp_path))
    for row in result["rows"]:
        assert row["bytes"]["ours"] == row["bytes"]["kept"] < row["bytes"]["stock"]
        assert row["over"]["padded"]["median"] > 0
    pages = report.write(tmp_path, tmp_path / "docs")
    assert any("| beams |" in page.read_text(encoding="utf-8") for page in pages if page.suffix == ".md")
