"""Runs the reproductions of docs/upstream: where one fails, upstream has been mended and the page has an entry to lose."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from trim_plugin.compat import NEWEST

DOCS = Path(__file__).parents[2] / "docs"
FILES = sorted((DOCS / "upstream").glob("*.py"))


def test_the_files_are_the_page():
    place = importlib.util.spec_from_file_location("make_reproductions", DOCS / "make_reproductions.py")
    script = importlib.util.module_from_spec(place)
    place.loader.exec_module(script)
    expected = script.reproductions((DOCS / "upstream.md").read_text(encoding="utf-8"))
    assert {path.name: path.read_text(encoding="utf-8") for path in FILES} == expected


@pytest.mark.skipif(
    Version(transformers.__version__).release[:2] != Version(NEWEST).release, reason=f"the page describes {NEWEST}"
)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_reproduction_runs_alone(path):
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), {})
    except AssertionError as error:
        raise AssertionError(f"upstream has mended it: {path.stem}") from error
