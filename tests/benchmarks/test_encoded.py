"""The benchmark of pictures that are encoded before any question."""

import argparse
import shutil

import pytest

from benchmarks import report
from benchmarks.common.results import read_result, write_result
from benchmarks.quality import encoded, encoded_report
from benchmarks.quality.rules import Rule
from trim_plugin import KCenter
from trim_plugin.embedded import SMALL_MODEL


def test_encoded_pictures_are_measured_beside_stock(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "SHARES", (None, 0.25))
    monkeypatch.setattr(encoded, "KNOWING", [Rule("k-center, merged", 0.25, {"processors": [KCenter(0.25)]})])
    result = encoded.run(argparse.Namespace(scenes=4, quick=False, out=tmp_path, model=None, resume=False))
    stock, whole, quarter, known = [row for row in result["rows"] if row["where"] == "fresh"]
    for turn in (whole, whole["follow_up"]):
        assert turn["agreement"] == 1.0
        assert turn["change"] == 0.0
    assert whole["accuracy"] == stock["accuracy"]
    assert whole["kept_share"] == whole["bytes_of_whole"] == 1.0
    assert 0.25 <= quarter["kept_share"] < 0.27
    assert quarter["bytes_of_whole"] < 0.26
    assert known["kept_share"] == quarter["kept_share"]
    assert {row["where"] for row in result["rows"]} == {"evaluation", "fresh"}
    page = report.write(tmp_path, tmp_path / "docs")[0].read_text(encoding="utf-8")
    assert "| encoded 0.25 |" in page


@pytest.mark.parametrize("name", ["quality", "encoded"])
def test_what_was_measured_earlier_is_not_measured_again(tmp_path, monkeypatch, name):
    keys = [("stock", None), ("encoded", 0.25), ("k-center, merged", 0.25)]
    rows = [{"where": "fresh", "rule": rule, "parameter": share, "kept_share": 0.123} for rule, share in keys]
    write_result(name, {"scenes": 2, "rows": rows[::-1]}, tmp_path)
    monkeypatch.setattr(encoded, "SCENE_SETS", {"fresh": 700_000_000})
    monkeypatch.setattr(encoded, "SHARES", (0.25,))
    monkeypatch.setattr(encoded, "KNOWING", encoded.KNOWING[:1])
    monkeypatch.setattr(encoded, "load", None)
    assert encoded.run(argparse.Namespace(scenes=2, quick=False, out=tmp_path, model=None, resume=True))["rows"] == rows


def test_another_model_is_measured_beside_its_own_answers(tmp_path, monkeypatch):
    shutil.copytree(SMALL_MODEL, tmp_path / "fine" / "model")
    write_result("quality", {"scenes": 2, "rows": [{"where": "fresh", "rule": "stock", "parameter": None}]}, tmp_path)
    monkeypatch.setattr(encoded, "SCENE_SETS", {"fresh": 700_000_000})
    monkeypatch.setattr(encoded, "SHARES", (0.25,))
    monkeypatch.setattr(encoded, "KNOWING", [])
    options = {"scenes": 2, "quick": False, "out": tmp_path, "model": tmp_path / "fine" / "model", "resume": True}
    result = encoded.run(argparse.Namespace(**options))
    assert result == read_result("encoded-fine", tmp_path)
    assert result["model"] == "fine"
    assert all("accuracy" in row for row in result["rows"])  # none is the other model's
    assert " points (fine)" in encoded_report.answers({"encoded-fine": result})
