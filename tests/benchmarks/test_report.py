import json

from benchmarks import report
from benchmarks.common.results import environment, write_result


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
