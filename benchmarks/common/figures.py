"""Plots as files, legible on a phone; no screen is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

#: Inches. A page shows a plot 350 to 700 pixels wide: letters of 10 points are then 9 to 18 pixels high.
WIDTH = 5.4
#: First word of a way that fits its name → colour, the same in every plot.
COLOURS = {
    "stock": "#9a9a9a",
    "exact": "#4477aa",
    "default": "#228833",
    "k-center, merged": "#228833",
    "in pieces": "#228833",
    "kept": "#228833",
    "a quarter": "#228833",
    "KCenter": "#aa3377",
    "paper, merged": "#aa3377",
    "encoded whole": "#d9a3c7",
    "encoded": "#aa3377",
    "random": "#ccbb44",
    "paper, dropped": "#ee6677",
}


def colour(way: str) -> str:
    """The colour of a way.

    Example:
        >>> colour("k-center, merged") == colour("default"), colour("stock again") == colour("stock")
        (True, True)
    """
    return next(value for name, value in COLOURS.items() if way.startswith(name))


def panels(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of the pages' width with its axes, letters and lines of one size."""
    style = {"font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams.update(style)
    return plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", **options)


def bars(axes: Any, groups: list[str], ways: dict[str, list[float | None]], label: str) -> None:
    """Horizontal bars side by side in every group, the value behind each; groups read from the top."""
    thick = 0.84 / len(ways)
    for number, (way, values) in enumerate(ways.items()):
        places = [group - 0.42 + (number + 0.5) * thick for group in range(len(groups))]
        drawn = axes.barh(
            places, [value or 0 for value in values], 0.92 * thick, label=way, color=colour(way), zorder=2
        )
        texts = ["" if value is None else f"{value:{label}}" for value in values]
        axes.bar_label(drawn, texts, padding=3, fontsize=9, bbox={"fc": "white", "ec": "none", "pad": 0.5}, zorder=4)
    axes.set_yticks(range(len(groups)), groups)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(groups) - 0.45, -0.55)
    axes.margins(x=0.12)


def save(figure: Any, path: Path, legend: int = 0) -> Path:
    """Write a figure, with a legend of that many columns below it, and forget it; returns the file."""
    if legend:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=legend, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, metadata={"Software": None})
    plt.close(figure)
    return path
