"""Runs the reproductions of docs/upstream.md: where one fails, upstream has been mended and the page has an entry to lose."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from trim_plugin.compat import NEWEST

PAGE = Path(__file__).parents[2] / "docs" / "upstream.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)
CODE = re.compile(r"^```python\n(.*?)^```", flags=re.M | re.S)


@pytest.mark.skipif(
    Version(transformers.__version__).release[:2] != Version(NEWEST).release, reason=f"the page describes {NEWEST}"
)
def test_reproductions():
    (setup,) = CODE.findall(SECTIONS[0])
    names = {}
    exec(compile(setup, "setup", "exec"), names)
    mended = []
    for section in SECTIONS[1:]:
        title = section.splitlines()[0]
        (code,) = CODE.findall(section)
        try:
            exec(compile(code, title, "exec"), names)
        except AssertionError:
            mended.append(title)
    assert mended == []
