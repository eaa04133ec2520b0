"""Tables of `benchmarks.latency.first_token`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.tables import milliseconds, percent, table
from trim_plugin.cache.report import format_bytes


def tables(result: dict[str, Any]) -> str:
    """Time to the first token of every way, and the 11B model's arithmetic."""
    parts = []
    for row in result["rows"]:
        counted, encoding, files = row["arithmetic"]["times_less"], row["encoding_seconds"], row["file_bytes"]
        parts.append(
            f"### Time to the first token, {row['shape']} ({row['dtype']})\n\n"
            f"One page of 4 tiles, {row['text_tokens']} text tokens, median of {row['rounds']} rounds. Encoding it takes "
            f"{milliseconds(encoding['whole'])} ms whole and {milliseconds(encoding['25 %'])} ms at 25 %, once; the files have "
            f"{format_bytes(files['whole'])} and {format_bytes(files['25 %'])} ({percent(files['25 %'] / files['whole'])}).\n"
        )
        parts.append(
            table(
                [
                    "way",
                    "ms",
                    "times less than stock (95 % interval of the median)",
                    "by its arithmetic",
                    "stock's token",
                ],
                [
                    [
                        way["way"],
                        milliseconds(way["seconds"]["median"]),
                        f"{way['times_less']['median']:.2f} ({way['interval'][0]:.2f} … {way['interval'][1]:.2f})",
                        f"{counted[way['way']]:.2f}" if way["way"] in counted else "–",
                        "yes" if way["same_token"] else "no",
                    ]
                    for way in row["ways"]
                ],
            )
        )
    return "\n".join([*parts, _arithmetic(result["arithmetic_11b"])])


def _arithmetic(counted: list[dict[str, Any]]) -> str:
    """What the 11B model would save: counted, not measured."""
    lines = [
        [
            str(one["text_rows"]),
            *(percent(one[part] / one["stock"]) for part in ("tower", "projector", "visual_keys_values", "text")),
            f"{one['times_less']['encoded whole']:.1f}",
            f"{one['times_less']['encoded 25 %']:.1f}",
        ]
        for one in counted
    ]
    header = ["text tokens", "tower", "projector", "visual keys, values", "text", "encoded whole", "encoded 25 %"]
    return (
        "### The 11B model's arithmetic to the first token\n\n"
        "**Counted, not measured**: floating-point operations of the real configuration about one page of 4 tiles; shares of "
        "stock's, then how many times fewer are left when the page is encoded. Time follows only as far as all parts run at the "
        "same speed.\n\n" + table(header, lines)
    )


def plots(result: dict[str, Any], assets: Path) -> list[Path]:
    """None: the tables say it."""
    return []
