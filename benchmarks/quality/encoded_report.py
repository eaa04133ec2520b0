"""Tables of `benchmarks.quality.encoded`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.tables import percent, table
from benchmarks.quality.report import MISSING, agreement, points

RULES = ("stock", "encoded", "k-center, merged", "paper, merged")
HEADER = (
    "",
    "kept of visible",
    "bytes of the whole",
    "right",
    "change, points (95 %)",
    "same as stock (95 %)",
    "follow-up: change",
    "follow-up: same",
)


def tables(result: dict[str, Any]) -> str:
    """A table for every set of scenes."""
    parts = [
        f"{result['questions']} questions about {result['scenes']} held-out scenes of each set, as many follow-ups. *Encoded* "
        "pictures were compacted by k-center and merging before any question; the rules below them choose when the question is "
        "known, and their first cross-attention layer reads the whole picture once.\n"
    ]
    for where in dict.fromkeys(row["where"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["where"] == where]
        rows.sort(key=lambda row: (RULES.index(row["rule"]), -row["kept_share"]))
        parts += [f"#### {where} scenes\n", table(HEADER, map(_cells, rows))]
    return "\n".join(parts)


def _cells(row: dict[str, Any]) -> list[str]:
    stock, size = row["rule"] == "stock", row.get("bytes_of_whole")
    parameter = "" if stock else " whole" if row["parameter"] is None else f" {row['parameter']:g}"
    return [
        row["rule"] + parameter,
        percent(row["kept_share"]),
        MISSING if size is None else percent(size),
        percent(row["accuracy"]),
        MISSING if stock else points(row),
        MISSING if stock else agreement(row),
        MISSING if stock else points(row["follow_up"]),
        MISSING if stock else agreement(row["follow_up"]),
    ]


def plots(result: dict[str, Any], assets: Path) -> list[Path]:
    """None: the tables say it."""
    return []
