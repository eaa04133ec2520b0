"""Tables and plots of `benchmarks.quality.measure`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.common.figures import save
from benchmarks.common.tables import folded, percent, table

#: Rules that the plot shows in colour.
SHOWN = ("paper", "best of cells", "paper, merged", "top-p", "evenly spaced", "head mean")


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
        "### Down to which share does a rule cost at most 0.5 points?\n",
        "The smallest measured kept share such that this setting and every looser one of the rule lost at most 0.5 points; and "
        "the change of accuracy at a quarter of the tokens, read between the two nearest settings. *none*: the loosest setting, "
        "which for rules with a given share keeps 65 %, lost more:\n",
        _overview(result),
    ]
    if result.get("equal_tokens"):
        parts += [
            "### Best of cells against the paper's rule, at the paper's number of tokens\n",
            _equal_tokens(result),
        ]
    parts += [
        folded("Every setting of every rule", table(header, lines)),
        folded("The paper's rule by tiles of the picture", _tiles_table(result)),
    ]
    if result["conditions"]:
        parts += ["### Under quantization and an adapter\n", _conditions(result)]
    return "\n".join(parts)


def change_at(rows: list[dict[str, Any]], share: float) -> float | None:
    """Change to stock at a kept share, linear between the two nearest settings; None outside what was measured.

    Example:
        >>> change_at([{"kept_share": 0.2, "change": -0.1}, {"kept_share": 0.4, "change": 0.0}], 0.25)
        -0.075
    """
    ranked = sorted(rows, key=lambda row: row["kept_share"])
    for low, high in itertools.pairwise(ranked):
        if low["kept_share"] <= share <= high["kept_share"]:
            part = (share - low["kept_share"]) / (high["kept_share"] - low["kept_share"])
            return round(low["change"] + part * (high["change"] - low["change"]), 10)
    return None


def _overview(result: dict[str, Any]) -> str:
    lines = []
    for rule, smallest in result["loss_below_half_a_point"].items():
        if rule == "exact":
            continue
        own = [row for row in result["rows"] if row["rule"] == rule]
        quarter = change_at(own, 0.25)
        lines.append(
            (
                1.0 if smallest is None else smallest,
                [
                    rule,
                    str(len(own)),
                    "none" if smallest is None else percent(smallest),
                    "–" if quarter is None else f"{100 * quarter:+.1f}",
                ],
            )
        )
    header = ["rule", "settings", "kept of visible", "points at 25 % kept"]
    return table(header, [line for _, line in sorted(lines)])


def _equal_tokens(result: dict[str, Any]) -> str:
    lines = [
        [
            f"{row['paper_ratio']:g}",
            "as many" if row["part"] == 1.0 else f"{percent(row['part'], 0)} of them",
            percent(row["kept_share"]),
            percent(row["accuracy"]),
            points(row),
        ]
        for row in result["equal_tokens"]
    ]
    return table(
        [
            "the paper's ratio",
            "tokens",
            "kept of visible",
            "accuracy",
            "better than the paper's rule, points (95 % interval)",
        ],
        lines,
    )


def _conditions(result: dict[str, Any]) -> str:
    """The same model and cache format; changes are to that model with stock's cache."""
    lines = [
        [
            row["condition"],
            row["rule"],
            "–" if row["ratio"] is None else f"{row['ratio']:g}",
            percent(row["kept_share"]),
            percent(row["cross_kv_ratio"]),
            percent(row["accuracy"]),
            points(row),
            percent(row["agreement"]),
        ]
        for row in result["conditions"]
    ]
    header = [
        "condition",
        "rule",
        "parameter",
        "kept of visible",
        "cross KV of stock's",
        "accuracy",
        "change, points (95 % interval)",
        "same as stock",
    ]
    return "Changes are to the same model with stock's cache.\n\n" + table(header, lines)


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
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    families = [name for name in dict.fromkeys(row["rule"] for row in result["rows"]) if name not in ("stock", "exact")]
    for family in families:
        rows = sorted((row for row in result["rows"] if row["rule"] == family), key=lambda row: row["kept_share"])
        shares, middle = [row["kept_share"] for row in rows], [row["accuracy"] for row in rows]
        lists = [row["by_type"]["list"]["accuracy"] for row in rows]
        if family not in SHOWN:
            left.plot(shares, middle, color="lightgrey", lw=0.8, zorder=1)
            right.plot(shares, lists, color="lightgrey", lw=0.8, zorder=1)
            continue
        style = {
            "marker": "os^vD<>"[SHOWN.index(family)],
            "ms": 3,
            "lw": 1,
            "color": f"C{SHOWN.index(family)}",
            "label": family,
        }
        errors = [
            [max(0.0, row["accuracy"] - row["accuracy_interval"][0]) for row in rows],
            [max(0.0, row["accuracy_interval"][1] - row["accuracy"]) for row in rows],
        ]
        left.errorbar(shares, middle, yerr=errors, elinewidth=0.6, **style)
        right.plot(shares, lists, **style)
    left.axhline(stock["accuracy"], color="grey", lw=0.6)
    right.axhline(stock["by_type"]["list"]["accuracy"], color="grey", lw=0.6)
    left.set_title("all questions, with 95 % intervals", fontsize=10)
    right.set_title('"Read all digits." (long answers)', fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("kept share of visible tokens (measured)")
        axes.set_ylabel("accuracy")
    right.plot([], [], color="lightgrey", lw=0.8, label="the other rules")
    right.legend(fontsize=7)
    return [save(figure, assets / "quality.png")]
