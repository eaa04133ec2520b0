"""Rows from a JSON Lines file, each with an id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file. A line that is no row stands there all the same, to be answered with an error.

    Args:
        file: a line for each row: `{"id", "images": [...], "question" | "messages"}`. A row without an id is known by the
            number of its line, from 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds nothing, or an id occurs twice.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "questions.jsonl"
        >>> _ = file.write_text('{"id": "a", "question": "How many?"}' + chr(10) + '{"question": "Which?"}')
        >>> [row["id"] for row in read_rows(file)]
        ['a', '2']
    """
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    rows: list[dict[str, Any]] = []
    ids: dict[str, int] = {}
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = _row(line, number)
            if row["id"] in ids:
                raise ValueError(
                    f"{file.name}, line {number}: the id {row['id']!r} is that of line {ids[row['id']]}, too"
                )
            ids[row["id"]] = number
            rows.append(row)
    if not rows:
        raise ValueError(f"{file} is empty")
    return rows


def _row(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return {"id": str(number), "broken": f"line {number} is not JSON: {error}"}
    if not isinstance(row, dict):
        return {
            "id": str(number),
            "broken": f"line {number} is not an object such as {{'images': [...], 'question': ...}}",
        }
    return {**row, "id": str(row.get("id", number))}
