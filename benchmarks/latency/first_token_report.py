"""Tables of `benchmarks.latency.first_token`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.figures import bars, panels, save
from benchmarks.common.tables import milliseconds, percent, table
from trim_plugin.cache.report import format_bytes

ENCODED = ("encoded whole", "encoded 25 %")


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


def sooner(results: dict[str, dict[str, Any]]) -> str:
    """How many times sooner the first token comes about an encoded page."""
    result = results["first_token"]
    lines = []
    for row in result["rows"]:
        found = {one["way"]: one["times_less"]["median"] for one in row["ways"]}
        whole, quarter = (f"{found[way]:.1f} ({row['arithmetic']['times_less'][way]:.1f})" for way in ENCODED)
        lines.append(
            f"- {row['shape']}, measured (by arithmetic): {whole} times sooner, {quarter} when compacted to 25 %.\n"
        )
    for one in result["arithmetic_11b"][:2]:
        whole, quarter = (one["times_less"][way] for way in ENCODED)
        lines.append(f"- 11B, *counted* for {one['text_rows']} text tokens: {whole:.1f} and {quarter:.1f}.\n")
    return "".join(lines)


def plots(result: dict[str, Any], assets: Path) -> list[Path]:
    """Time and arithmetic that is left when a page is encoded, over stock's."""
    figure, axes = panels(3.6)
    groups, ways = [], {way: [] for way in ("stock", *ENCODED)}
    for row in result["rows"]:
        groups.append(f"{row['shape']},\nmeasured")
        for way, values in ways.items():
            values.append(1 / next(one["times_less"]["median"] for one in row["ways"] if one["way"] == way))
    for one in result["arithmetic_11b"][:2]:
        groups.append(f"11B, counted,\n{one['text_rows']} text tokens")
        for way, values in ways.items():
            values.append(1 / one["times_less"].get(way, 1.0))
    bars(axes, groups, ways, ".2f")
    axes.set_xlabel("time to the first token about an encoded page / stock's")
    return [save(figure, assets / "first-token.png", legend=3)]
