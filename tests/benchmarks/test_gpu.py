"""The GPU benchmark's code, on a tiny model and whatever device is here."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.common.arithmetic import tower_operations
from benchmarks.common.cost import Counts
from benchmarks.gpu import predicted, report
from benchmarks.gpu.measure import FIGURES


@pytest.mark.slow
def test_every_figure_is_there(tmp_path):
    main(["gpu", "--tiny", "--device", "cpu", "--out", str(tmp_path), "--threads", "1"])
    result = json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert result["left_out"] == {}
    assert list(result["figures"]) == list(FIGURES)
    prefill = {row["way"]: row for row in result["figures"]["prefill"]}
    # k-center looks at no scores, so none are worked out.
    assert set(prefill["k-center 0.1"]) == {"way", "tower", "k-center", "merging", "whole", "rest"}
    assert {"scoring", "merging"} <= set(prefill["ratio 0.1"])
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


@pytest.fixture(scope="module")
def on_paper():
    return predicted.model_on_paper()


def test_operations_on_paper_are_those_of_the_configuration(on_paper):
    """Counted from what runs, and from the configuration's numbers."""
    vision = on_paper.config.vision_config
    whole, _ = predicted.tower(on_paper, 4, None)
    assert whole.operations == pytest.approx(tower_operations(vision), rel=0.02)


def test_the_tower_on_paper_runs_on_what_is_left(on_paper, monkeypatch):
    monkeypatch.setattr(predicted, "choosing", lambda *given: Counts(1000, 0, 0))
    vision = on_paper.config.vision_config
    for tiles in (1, 4):
        whole, own = predicted.tower(on_paper, tiles, 0.5)
        counted = tower_operations(vision, tiles, 0.5)
        assert whole.operations == pytest.approx(counted, rel=0.03)
        assert own.launches > 2000, "patches and padding are chosen from"


@pytest.fixture(scope="module")
def prediction():
    return predicted.predict(("kept 0.1", "kept 0.5"), shares=())


def test_what_is_added_to_a_prefill_is_little(prediction):
    rows = {(row["part"], row["way"]): row for row in prediction["rows"]}
    for way in ("kept 0.1", "kept 0.5"):
        own = rows["own work", way]
        parts = [rows[part, way] for part in ("scoring", "choosing", "merging")]
        for what in ("launches", "bytes", "operations"):
            assert own[what] == sum(part[what] for part in parts)
            assert all(part[what] > 0 or what == "operations" for part in parts)
        assert own["share"]["H100"] < 0.03
        assert own["share"]["4090"] < 0.03
        assert rows["step", way]["launches"] <= rows["step", "stock"]["launches"]
        assert rows["step", way]["bytes"] < rows["step", "stock"]["bytes"]
    assert rows["prefill", "kept 0.1"]["operations"] < rows["prefill", "kept 0.5"]["operations"]


def test_choosing_by_k_center_is_little():
    """What the default may cost: 3 % of a page's prefill."""
    rows = {row["part"]: row for row in predicted.predict(("k-center 0.35",), shares=())["rows"]}
    assert rows["choosing"]["launches"] <= 450
    assert rows["own work"]["share"]["H100"] < 0.032


def test_a_row_is_the_formula(prediction):
    row = prediction["rows"][0]
    assert (row["part"], row["way"]) == ("prefill", "stock")
    expected = row["launches"] * 4e-6 + row["bytes"] / 1e12 + row["operations"] / 165e12
    assert row["seconds"]["4090"] == pytest.approx(expected, rel=1e-6)


def test_k_center_runs_on_numbers():
    few, many = (predicted.choosing(400, 500, 64, share) for share in (0.02, 0.3))
    assert 0 < few.launches < many.launches
    assert 0 < few.operations <= many.operations


def test_predicted_stands_beside_measured(prediction):
    measured = {
        "prefill": [{"way": "stock", "whole": 0.1}, {"way": "ratio 0.1", "whole": 0.09}, {"way": "exact", "whole": 1}],
        "decoding, batch 1": [{"way": "kept 0.1, merged", "step_seconds": {"median": 0.02}}],
    }
    lines = report.beside({"figures": measured}, prediction).splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| prefill", "stock", "100"],
        ["| prefill", "ratio 0.1", "90"],
        ["| step", "kept 0.1, merged", "20"],
    ]


def test_the_command_predicts_without_a_gpu(prediction, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predicted, "predict", lambda: prediction)
    main(["gpu", "--predicted", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "predicted.json").read_text())["rows"] == prediction["rows"]
    assert "Predicted, not measured" in capsys.readouterr().out


def test_where_the_towers_share_pays_is_said_by_tiles_and_device():
    def row(tiles, part, h100, other):
        own = {"tiles": tiles, "part": part, "way": "share 0.5", "launches": 10}
        return own | {"share": {"H100": h100, "4090": other}}

    rows = [row(1, "tower", 0.5, 0.5), row(4, "tower", 1.5, 0.8), row(1, "own work", 0, 0), row(4, "own work", 0, 0)]
    lines = report.tower({"predicted": {"tower": rows}}).splitlines()
    assert lines[-2:] == [
        "- H100: pictures of 1 tile: it pays at 0.5; pictures of 4 tiles: it does not pay. "
        "Where it does not pay, `tower_share` is experimental.",
        "- 4090: pictures of 1 tile: it pays at 0.5; pictures of 4 tiles: it pays at 0.5.",
    ]
