"""Tables and plots of `benchmarks.quality`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.figures import save
from benchmarks.markdown import percent, table


def points(row: dict[str, Any]) -> str:
    """The change to stock in percentage points, with its interval."""
    low, high = row["change_interval"]
    return f"{100 * row['change']:+.1f} ({100 * low:+.1f} … {100 * high:+.1f})"


def tables(result: dict[str, Any]) -> str:
    """Accuracy of every rule, by type and tiles, and under quantization."""
    kinds = list(result["rows"][0]["by_type"])
    lines = []
    for row in result["rows"]:
        change = "–" if row["rule"] == "stock" else points(row)
        lines.append(
            [
                row["rule"],
                "–" if row["parameter"] is None else f"{row['parameter']:g}",
                percent(row["kept_share"]),
                percent(row["accuracy"]),
                change,
                percent(row["agreement"]),
                *(percent(row["by_type"][kind]["accuracy"]) for kind in kinds),
            ]
        )
    header = [
        "rule",
        "parameter",
        "kept of visible",
        "accuracy",
        "change to stock, points (95 % interval)",
        "same as stock",
        *kinds,
    ]
    parts = [
        f"{result['questions']} questions about {result['scenes']} held-out scenes.\n",
        "Smallest measured kept share down to which no setting of a rule lost more than 0.5 points:\n",
        table(
            ["rule", "kept of visible"],
            [
                [rule, "none" if share is None else percent(share)]
                for rule, share in result["loss_below_half_a_point"].items()
                if rule != "exact"
            ],
        ),
        "All settings:\n",
        table(header, lines),
        "The paper's rule by tiles of the picture:\n",
        _tiles_table(result),
    ]
    if result["conditions"]:
        parts.append("Under quantization and adapters (change: to the same model with stock's cache):\n")
        parts.append(
            table(
                [
                    "condition",
                    "ratio",
                    "kept of visible",
                    "cross KV of stock's",
                    "accuracy",
                    "change, points (95 % interval)",
                    "same as stock",
                ],
                [
                    [
                        row["condition"],
                        "stock" if row["ratio"] is None else f"{row['ratio']:g}",
                        percent(row["kept_share"]),
                        percent(row["cross_kv_ratio"]),
                        percent(row["accuracy"]),
                        points(row),
                        percent(row["agreement"]),
                    ]
                    for row in result["conditions"]
                ],
            )
        )
    return "\n".join(parts)


def _tiles_table(result: dict[str, Any]) -> str:
    counts = list(result["rows"][0]["by_tiles"])
    rows = [row for row in result["rows"] if row["rule"] in ("stock", "paper")]
    return table(
        ["ratio", *(f"{count} tile{'s' * (count != '1')}: kept, accuracy" for count in counts)],
        [
            [
                "stock" if row["parameter"] is None else f"{row['parameter']:g}",
                *(
                    f"{percent(part['kept_share'], 0)}, {percent(part['accuracy'])}"
                    for part in (row["by_tiles"][count] for count in counts)
                ),
            ]
            for row in rows
        ],
    )


def plots(result: dict[str, Any], assets: Path) -> list[Path]:
    """Accuracy against kept share, all questions and lists alone."""
    stock = result["rows"][0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    families = [name for name in dict.fromkeys(row["rule"] for row in result["rows"]) if name not in ("stock", "exact")]
    for number, family in enumerate(families):
        rows = sorted((row for row in result["rows"] if row["rule"] == family), key=lambda row: row["kept_share"])
        shares = [row["kept_share"] for row in rows]
        style = {"marker": "os^vD<>Px*"[number % 10], "ms": 3, "lw": 1, "label": family}
        middle = [row["accuracy"] for row in rows]
        errors = [
            [max(0.0, row["accuracy"] - row["accuracy_interval"][0]) for row in rows],
            [max(0.0, row["accuracy_interval"][1] - row["accuracy"]) for row in rows],
        ]
        left.errorbar(shares, middle, yerr=errors if family.startswith("paper") else None, elinewidth=0.6, **style)
        right.plot(shares, [row["by_type"]["list"]["accuracy"] for row in rows], **style)
    left.axhline(stock["accuracy"], color="grey", lw=0.6)
    right.axhline(stock["by_type"]["list"]["accuracy"], color="grey", lw=0.6)
    left.set_title("all questions (95 % intervals on the paper's rule)", fontsize=10)
    right.set_title('"Read all digits." (long answers)', fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("kept share of visible tokens (measured)")
        axes.set_ylabel("accuracy")
    right.legend(fontsize=7)
    return [save(figure, assets / "quality.png")]
