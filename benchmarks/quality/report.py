"""Tables and plots of `benchmarks.quality.measure`: an overview, and every figure for a page of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.common.figures import save
from benchmarks.common.tables import percent, table

TITLE = """# Quality: every figure

Made by `python -m benchmarks quality`; what it means is in [Benchmarks](benchmarks.md#quality). *kept of visible* is measured:
the paper's rule keeps a union over heads, more than its ratio. *follow-up* is a second question in the same conversation, after
stock's first answer.
"""
#: Scene sets, the one that the overview and the plot show first.
SETS = {"fresh": "scenes that nothing was chosen on", "evaluation": "scenes of earlier tables"}
#: Kept shares of the overview.
SHARES = (0.25, 0.15, 0.1, 0.05)
MISSING = "–"
Row = dict[str, Any]


def points(row: dict[str, Any]) -> str:
    """The change to stock in percentage points, with its interval."""
    low, high = row["change_interval"]
    return f"{100 * row['change']:+.1f} ({100 * low:+.1f} … {100 * high:+.1f})"


def agreement(row: dict[str, Any]) -> str:
    """The share of answers that are stock's, with its interval."""
    low, high = row["agreement_interval"]
    return f"{percent(row['agreement'])} ({100 * low:.1f} … {100 * high:.1f})"


def tables(result: dict[str, Any]) -> str:
    """What matters: every rule at a few kept shares, and the conditions."""
    stock = next(row for row in result["rows"] if row["where"] == _shown(result) and row["rule"] == "stock")
    parts = [
        f"{result['questions']} questions about {result['scenes']} held-out scenes, of which stock answers "
        f"{percent(stock['accuracy'])} rightly, and as many follow-up questions in the same conversation, on "
        f"{SETS[_shown(result)]}.\n",
        _overview(result),
        _conditions(result),
        "[Every setting, both sets of scenes, with intervals](quality-tables.md)\n",
    ]
    return "\n".join(part for part in parts if part)


def details(result: dict[str, Any]) -> str:
    """Every row that was measured."""
    header = [
        "rule",
        "parameter",
        "kept of visible",
        "accuracy",
        "change, points (95 %)",
        "same as stock (95 %)",
        "follow-up: accuracy",
        "follow-up: change, points",
        "follow-up: same as stock",
    ]
    parts = []
    for where in [*SETS, *_condition_names(result)]:
        rows = [row for row in result["rows"] if row["where"] == where]
        if rows:
            rows.sort(key=lambda row: (row["rule"] != "stock", row["rule"], -row["kept_share"]))
            lines = [_line(row) for row in rows]
            parts.append(
                f"### {where[0].upper()}{where[1:]}\n\n{rows[0]['questions']} questions.\n\n{table(header, lines)}"
            )
    return "\n".join(parts)


def _line(row: dict[str, Any]) -> list[str]:
    stock, second = row["rule"] == "stock", row["follow_up"]
    return [
        row["rule"],
        MISSING if row["parameter"] is None else f"{row['parameter']:g}",
        percent(row["kept_share"]),
        percent(row["accuracy"]),
        MISSING if stock else points(row),
        MISSING if stock else agreement(row),
        percent(second["accuracy"]),
        MISSING if stock else points(second),
        MISSING if stock else agreement(second),
    ]


def nearest(rows: list[Row], share: float) -> Row | None:
    """The setting that kept about this share, within a fifth of it; None if there is none.

    Example:
        >>> nearest([{"kept_share": 0.2}, {"kept_share": 0.24}], 0.25), nearest([{"kept_share": 0.5}], 0.25)
        ({'kept_share': 0.24}, None)
    """
    best = min(rows, key=lambda row: abs(row["kept_share"] - share), default=None)
    return best if best is not None and abs(best["kept_share"] - share) <= 0.2 * share else None


def _families(result: dict[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys(row["rule"] for row in result["rows"]) if name not in ("stock", "exact")]


def _overview(result: dict[str, Any]) -> str:
    where = _shown(result)
    lines = []
    for family in _families(result):
        cells = [family]
        for share in SHARES:
            row = nearest([row for row in result["rows"] if row["where"] == where and row["rule"] == family], share)
            figures = (row["agreement"], row["follow_up"]["agreement"]) if row else ()
            cells.append(f"{100 * row['change']:+.1f}; {', '.join(map(percent, figures))}" if row else MISSING)
        lines.append(cells)
    header = ["rule", *(f"about {percent(share, 0)} kept: points; same as stock, follow-up same" for share in SHARES)]
    return table(header, lines)


def _conditions(result: dict[str, Any]) -> str:
    """The merged rules under every condition; changes are to the same model with stock's cache."""
    lines = []
    for name in _condition_names(result):
        for row in result["rows"]:
            if row["where"] == name and row["rule"].endswith("merged"):
                lines.append(
                    [
                        name,
                        f"{row['rule']} {row['parameter']:g}",
                        percent(row["kept_share"]),
                        percent(row["cross_kv_ratio"]),
                        points(row),
                        percent(row["agreement"]),
                        percent(row["follow_up"]["agreement"]),
                    ]
                )
    if not lines:
        return ""
    header = [
        "condition",
        "rule",
        "kept of visible",
        "cross KV of stock's",
        "points (95 %)",
        "same as stock",
        "follow-up same",
    ]
    return "Against the same model with stock's cache:\n\n" + table(header, lines)


def _condition_names(result: dict[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys(row["where"] for row in result["rows"]) if name not in SETS]


def _shown(result: dict[str, Any]) -> str:
    """The scene set of the overview and the plot: the one with most rows."""
    return max(SETS, key=lambda name: sum(row["where"] == name for row in result["rows"]))


def plots(result: dict[str, Any], assets: Path) -> list[Path]:
    """Agreement with stock against the kept share: the question, and the follow-up."""
    where = _shown(result)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharex=True)
    for number, family in enumerate(_families(result)):
        rows = sorted(
            (row for row in result["rows"] if row["where"] == where and row["rule"] == family),
            key=lambda row: row["kept_share"],
        )
        style = {"marker": "os^vD<>P"[number % 8], "ms": 3, "lw": 1, "elinewidth": 0.6, "label": family}
        style["ls"] = "-" if family.endswith(", merged") else ":"
        for panel, turn in zip(axes, ("first", "follow_up"), strict=True):
            own = [row if turn == "first" else row[turn] for row in rows]
            middle = [part["agreement"] for part in own]
            errors = [
                [max(0.0, part["agreement"] - part["agreement_interval"][0]) for part in own],
                [max(0.0, part["agreement_interval"][1] - part["agreement"]) for part in own],
            ]
            panel.errorbar([row["kept_share"] for row in rows], middle, yerr=errors, color=f"C{number}", **style)
    for panel, title in zip(axes, ("the question", "another question in the same conversation"), strict=True):
        panel.set_title(title, fontsize=10)
        panel.set_xscale("log")
        ticks = (0.025, 0.05, 0.1, 0.25, 0.5)
        panel.set_xticks(ticks, [percent(tick, 1 if tick < 0.05 else 0) for tick in ticks])
        panel.minorticks_off()
        panel.set_xlabel("kept share of visible tokens (measured)")
        panel.set_ylabel("answers that are stock's")
    axes[0].legend(fontsize=7)
    name = "quality" if result["model"] == "shipped" else f"quality-{result['model']}"
    return [save(figure, assets / f"{name}.png")]
