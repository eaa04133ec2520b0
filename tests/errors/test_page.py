"""Every row of docs/errors.md has its test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from ..batching.test_failures import BROKEN
from ..serving.wrong import MESSAGES, PICTURES, SETTINGS

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "errors.md"
#: Where a row's test may stand, by its name: `test_` and the row's.
FILES = (
    *(TESTS / "errors").glob("test_*.py"),
    *(TESTS / "asking").glob("test_*.py"),
    *(TESTS / "batching").glob("test_*.py"),
    TESTS / "commands" / "test_batch.py",
    TESTS / "commands" / "test_eval.py",
    TESTS / "commands" / "test_serve.py",
    TESTS / "pictures" / "test_opening.py",
    TESTS / "pictures" / "test_stored.py",
    TESTS / "serving" / "test_app.py",
    TESTS / "test_compat.py",
)


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
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in FILES]
    names = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {name.removeprefix("test_").replace("_", "-") for name in names if name.startswith("test_")}


def test_every_row_has_its_test():
    rows, names = set(rows_of_the_page()), functions() | set(cases())
    assert rows
    assert rows <= names, f"rows of docs/errors.md without a test: {sorted(rows - names)}"


def test_every_broken_row_and_refused_request_has_its_row():
    rows = rows_of_the_page()
    assert set(cases()) <= set(rows)
    said = {name: [text for text in texts if text not in rows[name]] for name, texts in cases().items()}
    assert {name: missing for name, missing in said.items() if missing} == {}
