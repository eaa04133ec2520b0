"""Tables of `benchmarks.latency.reading`."""

from __future__ import annotations

from typing import Any

from benchmarks.common.tables import table
from trim_plugin.cache.report import format_bytes


def tables(result: dict[str, Any]) -> str:
    """What a step reads, and how long that takes beside other ways of holding the same tokens."""
    header = [
        "kept tokens",
        "ms a step",
        "over itself again",
        "over padded and repeated",
        "over stock",
        "bytes read",
        "bytes kept",
        "bytes of stock",
    ]
    rows = []
    for row in result["rows"]:
        over = [_ratio(row["over"][way]) for way in ("ours again", "padded", "stock")]
        held = [format_bytes(row["bytes"][what]) for what in ("ours", "kept", "stock")]
        rows.append([row["case"], f"{row['ms']['ours']['median']:.1f}", *over, *held])
    return "The attention of one cross-attention layer at 11B widths, float32; medians and quartiles:\n\n" + table(
        header, rows
    )


def _ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f} … {spread['high']:.2f})"
