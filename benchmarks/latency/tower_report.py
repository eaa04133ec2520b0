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
