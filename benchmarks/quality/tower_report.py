"""Tables of `benchmarks.quality.tower`."""

from __future__ import annotations

from typing import Any

from benchmarks.common.tables import percent, table
from benchmarks.quality.report import MISSING, agreement, points

#: Name of the result → what the pages call the model.
MODELS = {"tower_quality": "small", "tower_quality-fine": "fine", "tower_quality-pages": "pages"}
BEHIND = {("everything", 1.0): "all", ("k-center, merged", 0.25): "25 %", ("k-center, merged", 0.1): "10 %"}
Row = dict[str, Any]


def tables(result: dict[str, Any]) -> str:
    """Every share, by tiles and by what is kept behind the tower."""
    header = [
        "tiles",
        "tower share",
        "kept behind",
        "times less arithmetic",
        "of the 11B tower",
        "change, points (95 %)",
    ]
    header += ["same as stock (95 %)", "follow-up: same"]
    intro = f"{result['questions']} questions about {result['scenes']} scenes of each number of tiles, as many follow-ups.\n\n"
    return intro + table(header, map(_line, result["rows"]))


def _line(row: Row) -> list[str]:
    share = row["tower_share"]
    return [
        str(row["tiles"]),
        MISSING if share is None else f"{share:g}",
        BEHIND[row["rule"], row["parameter"]],
        f"{row['by_arithmetic']:.2f}",
        f"{row['by_arithmetic_11b']:.2f}",
        points(row),
        agreement(row),
        agreement(row["follow_up"]),
    ]


def answers(results: dict[str, dict[str, Any]]) -> str:
    """Both models side by side where everything is kept behind the tower: a line a share."""
    lines = []
    for name, model in MODELS.items():
        rows = results.get(name, {"rows": []})["rows"]
        for row in sorted(
            (row for row in rows if row["tower_share"]), key=lambda row: (row["tiles"], -row["tower_share"])
        ):
            if row["rule"] == "everything":
                lines.append(
                    [
                        model,
                        str(row["tiles"]),
                        f"{row['tower_share']:g}",
                        f"{row['by_arithmetic']:.1f} ({row['by_arithmetic_11b']:.1f})",
                        points(row),
                        percent(row["agreement"]),
                        percent(row["follow_up"]["agreement"]),
                    ]
                )
    header = ["model", "tiles", "share", "times less arithmetic (11B)", "points (95 %)", "same answer"]
    return table([*header, "same second answer"], lines)
