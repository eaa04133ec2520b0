from pathlib import Path

from trim_plugin.embedded import SMALL_MODEL


def test_the_shipped_model_is_small_and_safe():
    files = list(Path(SMALL_MODEL).iterdir())
    assert sum(path.stat().st_size for path in files) < 10 * 2**20
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors"}
