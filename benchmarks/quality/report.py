"""Tables and plot of `benchmarks.quality.measure`: every setting of one model, and all models side by side."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from benchmarks.common.figures import colour, panels, save
from benchmarks.common.tables import percent, table
from trim_plugin.config import DEFAULT_KEPT_SHARE

#: Name of the result → what the pages call the model.
MODELS = {"quality": "small", "quality-fine": "fine", "quality-pages": "pages"}
#: Scene sets, the one that the pages show first.
SETS = {"fresh": "scenes that nothing was chosen on", "evaluation": "scenes of earlier tables"}
#: What the models are compared on: rule and parameter → how a user writes it.
SETTINGS = {
    ("k-center, merged", DEFAULT_KEPT_SHARE): f"`KCenter({DEFAULT_KEPT_SHARE})`, the default",
    ("k-center, merged", 0.1): "`KCenter(0.1)`",
    ("paper, merged", 0.15): "`top_k_ratio=0.15`",
    ("random, merged", 0.1): "random tokens, merged",
    ("paper, dropped", 0.15): "`top_k_ratio=0.15, merge=False`",
}
#: What the first page shows of every model: setting → its short name, and what is said of it.
FIRST = {
    ("k-center, merged", DEFAULT_KEPT_SHARE): ("default", ("kept", "same answers", "points")),
    ("k-center, merged", 0.1): ("KCenter(0.1)", ("points",)),
}
PLOTTED = {
    "k-center, merged": "KCenter, the default rule (merged)",
    "paper, merged": "the paper's rule, merged",
    "random, merged": "random tokens, merged",
    "paper, dropped": "the paper's rule, dropped",
}
#: Rules whose types of questions are shown apart, and the types.
TYPED = ("paper, dropped", "paper, merged", "k-center, merged", "k-center radius, merged", "random, merged")
TYPED_KINDS = {"page": "whole pages", "absent": "not there"}
#: Rules whose smallest setting without a loss is looked for.
LADDERS = {"k-center, merged": "`KCenter(…)`", "paper, merged": "`top_k_ratio=…`"}
MISSING = "–"
Row = dict[str, Any]
Results = dict[str, dict[str, Any]]


def points(row: Row) -> str:
    """The change to stock in percentage points, with its interval."""
    low, high = row["change_interval"]
    return f"{100 * row['change']:+.1f} ({100 * low:+.1f} … {100 * high:+.1f})"


def agreement(row: Row) -> str:
    """The share of answers that are stock's, with its interval."""
    low, high = row["agreement_interval"]
    return f"{percent(row['agreement'])} ({100 * low:.1f} … {100 * high:.1f})"


def tables(result: dict[str, Any]) -> str:
    """Every row that was measured, by scenes and conditions."""
    setting = ["rule", "parameter", "kept"]
    asked = ["accuracy", "change, points (95 %)", "same as stock (95 %)"]
    parts = []
    for where in dict.fromkeys([*SETS, *(row["where"] for row in result["rows"])]):
        rows = [row for row in result["rows"] if row["where"] == where]
        rows.sort(key=lambda row: (row["rule"] != "stock", row["rule"], -row["kept_share"]))
        if rows:
            about = f", {SETS[where]}" if where in SETS else ""
            parts.append(f"### {where}{about}\n\n{rows[0]['questions']} questions:\n")
            first = [[*_setting(row), percent(row["cross_kv_ratio"]), *_turn(row, row)] for row in rows]
            parts.append(table([*setting, "cross KV of stock's", *asked], first))
            parts.append("Follow-ups in the same conversation:\n")
            parts.append(table([*setting, *asked], [[*_setting(row), *_turn(row, row["follow_up"])] for row in rows]))
    return "\n".join(parts)


def _setting(row: Row) -> list[str]:
    return [
        row["rule"],
        MISSING if row["parameter"] is None else f"{row['parameter']:g}",
        percent(row["kept_share"]),
    ]


def _turn(row: Row, turn: Row) -> list[str]:
    """What a question, or the follow-up, shows of a row."""
    stock = row["rule"] == "stock"
    return [
        percent(turn["accuracy"]),
        MISSING if stock else points(turn),
        MISSING if stock else agreement(turn),
    ]


def answers(results: Results) -> str:
    """The models side by side: every setting, a line a model."""
    models = {name: _rows(results[result]) for result, name in MODELS.items() if result in results}
    lines = []
    for setting in SETTINGS:
        for name, rows in models.items():
            if row := rows.get(setting):
                title = SETTINGS[setting] if name == next(iter(models)) else ""
                same = (_share(turn["agreement"]) for turn in (row, row["follow_up"]))
                lines.append([title, name, percent(row["kept_share"], 0), points(row), *same])
    header = ["setting", "model", "kept", "points (95 %)", "same answer", "same second answer"]
    asked = [
        f"{name} ({rows['stock', None]['questions']:,} questions, {percent(rows['stock', None]['accuracy'], 0)})"
        for name, rows in models.items()
        if ("stock", None) in rows
    ]
    return f"Accuracy in points against stock's, which is right in: {', '.join(asked)}.\n\n" + table(header, lines)


def _share(value: float) -> str:
    """A share of answers; what is not all of them is not called 100 %."""
    return "> 99.9 %" if 0.9995 <= value < 1 else percent(value)


def answers_by_model(results: Results) -> str:
    """A line a model, without intervals: for the first page."""
    lines = []
    for result, name in MODELS.items():
        rows = _rows(results[result]) if result in results else {}
        if all(setting in rows for setting in FIRST):
            shown = [_cells(rows[setting])[what] for setting, (_, said) in FIRST.items() for what in said]
            lines.append([name, *shown])
    named = [(short, what, what == said[0]) for short, said in FIRST.values() for what in said]
    return table(["model", *(f"{short}: {what}" if first else what for short, what, first in named)], lines)


def _cells(row: Row) -> dict[str, str]:
    return {
        "kept": percent(row["kept_share"], 0),
        "same answers": _share(row["agreement"]),
        "points": f"{100 * row['change']:+.1f}",
    }


def by_type(results: Results) -> str:
    """Whole pages and questions about what is not there apart from all questions, on the model that reads pages."""
    result = results.get("quality-pages")
    rows = _rows(result) if result else {}
    lines = []
    for (rule, parameter), row in sorted(rows.items(), key=lambda item: (item[0][0], -item[1]["kept_share"])):
        if rule in TYPED:
            parts = [row, *(row["by_type"][kind] for kind in TYPED_KINDS)]
            cells = [cell for part in parts for cell in (points(part), percent(part["agreement"]))]
            lines.append([rule, f"{parameter:g}", percent(row["kept_share"], 0), *cells])
    kinds = ["all", *(TYPED_KINDS[kind] for kind in TYPED_KINDS)]
    header = ["rule", "parameter", "kept", *(f"{kind}: {what}" for kind in kinds for what in ("points", "same"))]
    return table(header, lines)


def smallest(results: Results) -> str:
    """For each model and rule the smallest setting without a measurable loss: it and all larger ones reach stock's accuracy."""
    lines = []
    for rule, title in LADDERS.items():
        for result, name in MODELS.items():
            rows = [row for row in _rows(results[result]).values() if row["rule"] == rule] if result in results else []
            rows.sort(key=lambda row: -row["kept_share"])
            fine = [*itertools.takewhile(_loses_nothing, rows)]
            if fine:
                last = fine[-1]
                cells = [
                    f"{last['parameter']:g}",
                    percent(last["kept_share"], 0),
                    points(last),
                    percent(last["agreement"]),
                ]
                lines.append([title, name, *cells])
            elif rows:
                lines.append([title, name, "none", MISSING, MISSING, MISSING])
    return table(["rule", "model", "smallest setting", "kept", "points (95 %)", "same answer"], lines)


def _loses_nothing(row: Row) -> bool:
    """Whether the interval of the change reaches 0, for all questions and for every type where types were kept apart."""
    return all(part["change_interval"][1] >= 0 for part in (row, *row.get("by_type", {}).values()))


def conditions(results: Results) -> str:
    """What quantized weights and caches and an adapter change in what the merged rules lose: the worst case of each model.

    Where a condition costs stock itself much of its accuracy, there is little left to lose; these are told apart.
    """
    kinds: dict[str, None] = {}
    worst, broken = [], []
    for result, name in MODELS.items():
        rows = [row for row in results.get(result, {"rows": []})["rows"] if row["where"] not in SETS]
        kinds |= dict.fromkeys(row["where"].removesuffix(", evaluation") for row in rows)
        failing = _failing(results[result], rows) if rows else {}
        rows = [row for row in rows if row["rule"].endswith("merged")]
        sound = [row for row in rows if row["where"] not in failing]
        if sound:
            worst.append(f"{points(min(sound, key=lambda row: row['change']))} of {len(sound)} cases ({name})")
        if failing:
            same = min(row["agreement"] for row in rows if row["where"] in failing)
            broken.append(
                f"{'; '.join(failing)}: stock falls to {percent(min(failing.values()))} on {name}; "
                f"there {percent(same)} of answers stay."
            )
    if not worst:
        return ""
    said = f"Merged under {len(kinds)} other conditions (weights, KV, LoRA), points at worst: {'; '.join(worst)}."
    return "\n" + " ".join([said, *broken]) + "\n"


def _failing(result: dict[str, Any], rows: list[Row]) -> dict[str, float]:
    """Conditions that cost stock itself a fifth of its accuracy or more, and what is left of it."""
    usual = _rows(result).get(("stock", None))
    stock = {row["where"]: row["accuracy"] for row in rows if row["rule"] == "stock"}
    return {where: left for where, left in stock.items() if usual and left <= 0.8 * usual["accuracy"]}


def _rows(result: dict[str, Any]) -> dict[tuple[str, float | None], Row]:
    """Rule and parameter → row, of the scene set that the pages show: the one with most rows."""
    shown = max(SETS, key=lambda name: sum(row["where"] == name for row in result["rows"]))
    return {(row["rule"], row["parameter"]): row for row in result["rows"] if row["where"] == shown}


def plot(results: Results, assets: Path) -> list[Path]:
    """Agreement with stock against the kept share: the first question and the second, a column a model."""
    models = {name: _rows(results[result]) for result, name in MODELS.items() if result in results}
    if not models:
        return []
    figure, axes = panels(5.6, 2, len(models), sharex=True, sharey=True, squeeze=False)
    for column, (name, rows) in enumerate(models.items()):
        for line, (turn, title) in enumerate((("first", "first"), ("follow_up", "second"))):
            panel = axes[line, column]
            panel.set_title(f"{name}, {title}")
            panel.set_xscale("log")
            panel.set_xticks([0.02, 0.05, 0.1, 0.25, 0.6], ["2", "5", "10", "25", "60"])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            for rule, label in PLOTTED.items():
                own = sorted((row for row in rows.values() if row["rule"] == rule), key=lambda row: row["kept_share"])
                shares = [100 * (row if turn == "first" else row[turn])["agreement"] for row in own]
                style = {"marker": "o", "ms": 4, "ls": ":" if rule == "paper, dropped" else "-"}
                panel.plot([row["kept_share"] for row in own], shares, color=colour(rule), label=label, **style)
    for panel in axes[:, 0]:
        panel.set_ylabel("same as stock, %")
    for panel in axes[-1]:
        panel.set_xlabel("visual tokens kept, %")
    return [save(figure, assets / "quality.png", legend=2)]
