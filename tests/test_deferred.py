import importlib
import sys

import pytest

from trim_plugin.deferred import when_imported


@pytest.fixture
def late(tmp_path, monkeypatch):
    """A module that nobody has imported yet: its file."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "imported_late.py"
    file.write_text("value = 1\n")
    yield file
    sys.modules.pop("imported_late", None)


def test_it_is_called_once_the_module_is_whole(late):
    seen = []
    when_imported("imported_late", lambda: seen.append(sys.modules["imported_late"].value))
    when_imported("imported_late", lambda: seen.append("again"))
    assert seen == []
    module = importlib.import_module("imported_late")
    assert seen == [1, "again"]
    when_imported("imported_late", lambda: seen.append("at once"))
    importlib.reload(module)
    assert seen == [1, "again", "at once"]


def test_the_module_is_as_if_nobody_had_waited(late):
    when_imported("imported_late", lambda: None)
    module = importlib.import_module("imported_late")
    assert module.__spec__.loader is module.__loader__
    assert type(module.__loader__).__module__ != "trim_plugin.deferred"


def test_a_module_that_fails_is_waited_for_until_it_does_not(late):
    seen = []
    when_imported("imported_late", lambda: seen.append(True))
    late.write_text("raise RuntimeError('not yet')\n")
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module("imported_late")
    assert seen == []
    late.write_text("value = 'whole'\n")
    importlib.invalidate_caches()
    importlib.import_module("imported_late")
    assert seen == [True]
