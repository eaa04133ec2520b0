"""Every row of docs/errors.md has its test."""

from __future__ import annotations

import re
from pathlib import Path

from ..batching.test_failures import BROKEN
from ..serving.wrong import MESSAGES, PICTURES, SETTINGS

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "errors.md"


def rows_of_the_page() -> dict[str, str]:
    """What stands in the column of errors, by the row's name."""
    text = PAGE.read_text(encoding="utf-8")
    return {
        name: error.replace("\\|", "|")
        for name, _, error in re.findall(r"^\| `([a-z0-9-]+)` \| (.*?) \| (.*?) \|", text, flags=re.M)
    }


def cases() -> dict[str, list[str]]:
    """What must stand there of broken rows and refused requests, which one test goes through: texts, and a request's status."""
    found: dict[str, list[str]] = {}
    for name, (_, said) in BROKEN.items():
        found.setdefault("row-" + name.split(",")[0], [said])
    for name, (_, status, said) in {**PICTURES, **SETTINGS, **MESSAGES}.items():
        found.setdefault("request-" + name.split(",")[0], [f"{status}: ", said])
    return found


def functions() -> set[str]:
    """Tests by the names of rows: `test_` and the row's."""
    files = [file.read_text(encoding="utf-8") for file in TESTS.rglob("test_*.py")]
    return {name.replace("_", "-") for text in files for name in re.findall(r"^def test_(\w+)\(", text, flags=re.M)}


def test_every_row_has_its_test():
    rows, names = set(rows_of_the_page()), functions() | set(cases())
    assert rows
    assert rows <= names, f"rows of docs/errors.md without a test: {sorted(rows - names)}"


def test_every_broken_row_and_refused_request_has_its_row():
    rows = rows_of_the_page()
    assert set(cases()) <= set(rows)
    said = {name: [text for text in texts if text not in rows[name]] for name, texts in cases().items()}
    assert {name: missing for name, missing in said.items() if missing} == {}
