"""Table of `benchmarks.latency.pieces`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.tables import milliseconds, table


def tables(result: dict[str, Any]) -> str:
    """Time in pieces over the time of the whole."""
    lines = []
    for case in result["rows"]:
        for row in case["rows"]:
            ratio, (low, high) = row["ratio"], row["ratio_interval"]
            lines.append(
                [
                    f"{case['shape']}, batch {case['batch']}",
                    row["way"],
                    str(row["pieces"]),
                    milliseconds(row["seconds"]["median"]),
                    f"{ratio['median']:.3f} ({low:.3f} … {high:.3f})",
                    str(case["turns"]),
                ]
            )
    header = ["model, pages", "way", "pieces", "prefill, ms", "over whole, median (95 % interval)", "turns"]
    return "Time of the prefill, read in pieces and whole:\n\n" + table(header, lines)


def plots(result: dict[str, Any], assets: Path) -> list[Path]:
    """None."""
    return []
