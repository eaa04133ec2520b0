"""Tables of `benchmarks.quality.encoded`."""

from __future__ import annotations

from typing import Any

from benchmarks.common.tables import percent, table
from benchmarks.quality.report import MISSING, agreement, points

MODELS = {"encoded": "small", "encoded-fine": "fine", "encoded-pages": "pages"}
RULES = ("stock", "encoded", "k-center, merged", "paper, merged")
HEADER = ("", "kept of visible", "bytes of the whole", "right", "change, points (95 %)", "same as stock (95 %)")


def tables(result: dict[str, Any]) -> str:
    """A table for every set of scenes."""
    parts = [
        f"{result['questions']} questions about {result['scenes']} held-out scenes of each set, as many follow-ups.\n"
    ]
    for where in dict.fromkeys(row["where"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["where"] == where]
        rows.sort(key=lambda row: (RULES.index(row["rule"]), -row["kept_share"]))
        header = [*HEADER, "follow-up: change", "follow-up: same"]
        parts += [f"#### {where} scenes\n", table(header, map(_cells, rows))]
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


def answers(results: dict[str, dict[str, Any]]) -> str:
    """What compacting before any question costs, in one line a share."""
    lines = []
    for share in (0.25, 0.1):
        found = []
        for name, model in MODELS.items():
            rows = results.get(name, {"rows": []})["rows"]
            rows = [row for row in rows if (row["rule"], row["parameter"]) == ("encoded", share)]
            if rows:
                same, change = (min(row[what] for row in rows) for what in ("agreement", "change"))
                found.append(f"{percent(same)}, {100 * change:+.1f} points ({model})")
        if found:
            lines.append(f"- Compacted to {percent(share, 0)}, answers that are stock's, at worst: {'; '.join(found)}.")
    return "\n".join(lines) + "\n"
