"""Tables of `benchmarks.latency.tower`."""

from __future__ import annotations

from typing import Any

from benchmarks.common.tables import milliseconds, percent, table


def tables(result: dict[str, Any]) -> str:
    """Time, what choosing takes of it, and peak of every way."""
    local, around = result["vision_layers"]
    lines = [
        [
            str(row["tiles"]),
            row["way"],
            milliseconds(row["seconds"]["median"]),
            milliseconds(row["choosing_seconds"]["median"]),
            f"{row['times_less']['median']:.2f} ({row['interval'][0]:.2f} … {row['interval'][1]:.2f})",
            f"{row['by_arithmetic']:.2f}",
            f"{row['by_arithmetic_11b']:.2f}",
            percent(row["peak_share"]),
        ]
        for row in result["rows"]
    ]
    heading = f"### The vision tower on fewer patches ({result['dtype']})\n\n"
    text = (
        f"A tower of the 11B model's widths with {local} local and {around} global layers and random weights, one picture a "
        'call. "untouched again" is the noise. Choosing, with merging, is part of the time. The whole 11B tower is counted, not '
        "measured.\n\n"
    )
    head = [
        "tiles",
        "way",
        "ms",
        "of it choosing, ms",
        "times less (95 % interval of the median)",
        "by its arithmetic",
        "by the whole 11B tower's",
        "peak of untouched",
    ]
    return heading + text + table(head, lines)


def shorter(results: dict[str, dict[str, Any]]) -> str:
    """What one share gives at the real widths, a line for each number of tiles, with the noise."""
    rows = {(row["tiles"], row["way"]): row for row in results["tower"]["rows"]}
    lines = []
    for (tiles, way), row in rows.items():
        if way.startswith("share"):
            again = rows[tiles, "untouched again"]
            lines.append(
                [
                    str(tiles),
                    way.removeprefix("share "),
                    f"{row['times_less']['median']:.2f} (noise {again['times_less']['median']:.2f})",
                    f"{row['by_arithmetic']:.2f}",
                    percent(row["choosing_seconds"]["median"] / row["seconds"]["median"], 0),
                    f"{percent(row['peak_share'], 0)} (noise {percent(again['peak_share'], 0)})",
                ]
            )
    header = ["tiles", "share", "times less time", "by arithmetic", "of it choosing", "peak of untouched"]
    return table(header, lines)
