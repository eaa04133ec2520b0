"""The GPU benchmark's code, on a tiny model and whatever device is here."""

from __future__ import annotations

import json

from benchmarks.__main__ import main
from benchmarks.gpu.measure import FIGURES


def test_every_figure_is_there(tmp_path):
    main(["gpu", "--tiny", "--device", "cpu", "--out", str(tmp_path), "--threads", "1"])
    result = json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert result["left_out"] == {}
    assert list(result["figures"]) == list(FIGURES)
    prefill = {row["way"]: row for row in result["figures"]["prefill"]}
    assert {"tower", "scoring", "k-center", "merging", "whole", "rest"} <= set(prefill["k-center 0.1"])
    assert prefill["stock"].keys() == {"way", "tower", "whole", "rest"}
    assert abs(sum(prefill["stock"][part] for part in ("tower", "rest")) - prefill["stock"]["whole"]) < 1e-9
    decoding = {row["way"]: row for row in result["figures"]["decoding, batch 1"]}
    assert decoding["kept 0.1, merged"]["cross_kv"] == decoding["kept 0.1, dropped"]["cross_kv"]
    assert decoding["kept 0.1, merged"]["cross_kv"] < 0.2 * decoding["stock"]["cross_kv"]
    assert {row["largest_batch"] for row in result["figures"]["largest batch in 24 GiB"]} == {4}


def test_a_run_that_is_cut_off_keeps_what_it_has(tmp_path, monkeypatch):
    first = next(iter(FIGURES))
    monkeypatch.setitem(FIGURES, first, (lambda bench: setattr(bench, "end", 0.0) or ["measured"], 0))
    main(["gpu", "--tiny", "--device", "cpu", "--out", str(tmp_path), "--threads", "1"])
    result = json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert result["figures"] == {first: ["measured"]}
    assert list(result["left_out"]) == list(FIGURES)[1:]
