import argparse

from benchmarks import report
from benchmarks.quality import measure as quality
from benchmarks.quality import report as quality_report


def test_the_change_at_a_share_lies_between_the_nearest_settings():
    rows = [{"kept_share": 0.4, "change": 0.0}, {"kept_share": 0.2, "change": -0.1}]
    assert quality_report.change_at(rows, 0.3) == -0.05
    assert quality_report.change_at(rows, 0.5) is None


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


def test_the_smallest_share_stops_at_the_first_loss():
    rows = [
        {"rule": "r", "kept_share": share, "change": change}
        for share, change in ((0.2, 0.0), (0.4, -0.01), (0.6, -0.004))
    ]
    assert quality.smallest_share(rows, "r") == 0.6
    assert quality.smallest_share(rows, "other") is None
