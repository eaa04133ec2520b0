"""The benchmark of answers with fewer patches in the vision tower."""

import argparse

import pytest

from benchmarks import report
from benchmarks.quality import tower
from trim_plugin.embedded import load_small_model


@pytest.mark.slow
def test_shares_are_measured_beside_an_untouched_tower(tmp_path, monkeypatch):
    monkeypatch.setattr(tower, "SHARES", (0.6, 0.02))
    result = tower.run(argparse.Namespace(scenes=3, quick=False, out=tmp_path, model=None))
    assert result["questions"] == 15
    rows = {(row["tiles"], row["tower_share"], row["rule"], row["parameter"]): row for row in result["rows"]}
    assert len(rows) == 2 * 3 * 3
    for tiles in (1, 4):
        untouched = rows[tiles, None, "everything", 1.0]
        assert untouched["agreement"] == untouched["follow_up"]["agreement"] == untouched["by_arithmetic"] == 1.0
        saved = [rows[tiles, share, "everything", 1.0]["by_arithmetic"] for share in (0.6, 0.02)]
        assert 1.5 < saved[0] < saved[1]
        assert rows[tiles, 0.6, "k-center, merged", 0.1]["kept_share"] < 0.15
    # A fiftieth of the patches cannot do: the tower that is measured really merges.
    assert rows[4, 0.02, "everything", 1.0]["agreement"] < 0.9
    pages = {path.name: path for path in report.write(tmp_path, tmp_path / "docs")}
    assert "| 4 | 0.6 | 10 % |" in pages["tower_quality.md"].read_text(encoding="utf-8")


@pytest.mark.parametrize("tiles", tower.TILES)
def test_scenes_have_the_tiles_that_are_asked_for(tiles):
    model, _ = load_small_model()
    first, second = tower.scenes_of(tiles, 2, model)
    assert (first.image.tobytes(), first.image.size) != (second.image.tobytes(), second.image.size)
    size = model.config.vision_config.image_size
    for scene in (first, second):
        assert int(tower.image_inputs([scene.image], size)["aspect_ratio_mask"].sum()) == tiles
