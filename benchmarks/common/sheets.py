"""Results as sheets: one line a measurement, for a spreadsheet."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def flat(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Lines of an entry: names within names are joined by points; a list of entries gives a line for each.

    Example:
        >>> list(flat({"batch": 1, "rows": [{"way": "stock", "seconds": {"median": 2}}, {"way": "exact", "interval": [0, 1]}]}))
        [{'batch': 1, 'way': 'stock', 'seconds.median': 2}, {'batch': 1, 'way': 'exact', 'interval.0': 0, 'interval.1': 1}]
    """
    own: dict[str, Any] = {}
    inner: list[dict[str, Any]] = []
    for name, value in entry.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inner = value
        else:
            own |= _cells(name, value)
    yield from (own | line for part in inner for line in flat(part)) if inner else [own]


def _cells(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    return {key: cell for part, inner in value.items() for key, cell in _cells(f"{name}.{part}", inner).items()}


def sheets(name: str, result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """File name → lines, of every list of entries in a result: ``NAME.csv`` for its rows, ``NAME-LIST.csv`` for another list."""
    return {
        f"{name}.csv" if part == "rows" else f"{name}-{part}.csv": [line for entry in entries for line in flat(entry)]
        for part, entries in result.items()
        if isinstance(entries, list) and entries and isinstance(entries[0], dict)
    }


def write_sheet(path: Path, lines: list[dict[str, Any]]) -> Path:
    """Write lines as CSV; returns the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for line in lines for key in line), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return path
