"""Tables of `benchmarks.throughput.measure`."""

from __future__ import annotations

from typing import Any

from benchmarks.common.tables import milliseconds, table
from trim_plugin.cache.report import format_bytes


def tables(result: dict[str, Any]) -> str:
    """Throughput and waiting, beside one by one."""
    alone = result["rows"][0]["requests_a_second"]
    rows = [
        [
            row["way"],
            f"{row['requests_a_second']:.1f} ({row['spread'][0]:.1f} … {row['spread'][1]:.1f})",
            f"{row['requests_a_second'] / alone:.2f}",
            f"{row['tokens_a_second']:.0f}",
            milliseconds(row["first_median"]),
            milliseconds(row["first_p95"]),
            milliseconds(row["each_p95"]),
            format_bytes(row["held_bytes"]) if row["held_bytes"] else "",
        ]
        for row in result["rows"]
    ]
    header = [
        "",
        "requests a second (turns)",
        "over one by one",
        "tokens a second",
        "first token, ms",
        "its 95th percentile",
    ]
    header += ["ms a token, 95th percentile", "most held"]
    head = f"{len(result['lengths'])} requests, answers of 1 to {max(result['lengths'])} tokens, the small model:\n\n"
    return head + table(header, rows)
