"""A comparison table and plot from lmms-eval's result files.

    python -m trim_plugin.integrations.lmms_eval_table results --out comparison

reads every `*_results.json` under `results` and writes `comparison.md`, `comparison.json` and `comparison.png`: a row for every
cache (stock, exact, ratios), a column for every metric, and each metric relative to stock. Of two runs with the same cache
and task the newer counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trim_plugin.config import DEFAULT_KEPT_SHARE

STOCK = "stock"
#: Model arguments that name a rule, and how the table calls it.
RULES = {"kept_share": "k-center", "radius": "radius"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One metric of one task in one result file; `cache` is as `variant_of` returns it."""

    cache: str
    task: str
    metric: str
    value: float
    date: str


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Read result files; folders are searched.

    Raises:
        ValueError: no result file, or one that is not lmms-eval's.
    """
    files: list[Path] = []
    for path in paths:
        files += sorted(path.rglob("*_results.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError("no result files (*_results.json) there: run lmms-eval with --output_path")
    return [run for file in files for run in _runs_of(file)]


def _runs_of(file: Path) -> list[Run]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        results, config = content["results"], content["config"]
        model, arguments = config["model"], config.get("model_args") or ""
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a result file of lmms-eval ({type(error).__name__}: {error})") from None
    cache = variant_of(str(model), arguments)
    date = str(content.get("date", file.name))
    return [
        Run(cache, task, name.split(",")[0], float(value), date)
        for task, metrics in results.items()
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not _is_aside(name)
    ]


def _is_aside(name: str) -> bool:
    """Whether an entry is not a metric: standard errors, sample counts, and what lmms-eval derives from them."""
    metric = name.split(",")[0]
    return metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")) or metric in {"alias", "samples", "n", " "}


def variant_of(model: str, arguments: str | dict[str, Any]) -> str:
    """The variant that a run used, told from its model's name and arguments.

    Example:
        >>> variant_of("llama_vision", ""), variant_of("llama_vision_trimmed", "pretrained=x,top_k_ratio=0.5")
        ('stock', '0.5')
        >>> variant_of("llama_vision_trimmed", {"top_k_ratio": 1.0, "kv_quantization": "int8"})
        'exact, int8'
    """
    given = (
        arguments
        if isinstance(arguments, dict)
        else dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    )
    if model != "llama_vision_trimmed" or given.get("top_k_ratio") == STOCK:
        return STOCK
    if "top_k_ratio" in given:
        ratio = float(given["top_k_ratio"])
        name = "exact" if ratio == 1.0 else f"{ratio:g}"
    else:
        rule = next((rule for rule in RULES if rule in given), "kept_share")
        name = f"{RULES[rule]} {float(given.get(rule, DEFAULT_KEPT_SHARE)):g}"
    bits = given.get("kv_quantization")
    return f"{name}, {bits}" if bits else name


def newest(runs: Sequence[Run]) -> dict[tuple[str, str, str], float]:
    """Values by (cache, task, metric); the newest of several runs."""
    return {(run.cache, run.task, run.metric): run.value for run in sorted(runs, key=lambda run: run.date)}


def rows_and_columns(values: dict[tuple[str, str, str], float]) -> tuple[list[str], list[tuple[str, str]]]:
    """Caches from stock over exact to the smallest ratio, then other rules; and (task, metric) pairs."""

    def rank(cache: str) -> tuple[str, float, str]:
        rule, _, number = cache.split(",")[0].rpartition(" ")
        return (rule, -3.0 if number == STOCK else -2.0 if number == "exact" else -float(number), cache)

    return sorted({key[0] for key in values}, key=rank), sorted({key[1:] for key in values})


def markdown(values: dict[tuple[str, str, str], float]) -> str:
    """The table: values, and in brackets the share of stock's where there is one."""
    caches, columns = rows_and_columns(values)
    lines = [
        "| cache | " + " | ".join(f"{task}: {metric}" for task, metric in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for cache in caches:
        lines.append("| " + " | ".join([cache, *(_cell(values, cache, column) for column in columns)]) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: dict[tuple[str, str, str], float], cache: str, column: tuple[str, str]) -> str:
    value, stock = values.get((cache, *column)), values.get((STOCK, *column))
    if value is None:
        return "–"
    return f"{value:.4g}" if cache == STOCK or not stock else f"{value:.4g} ({100 * value / stock:.1f} %)"


def plot(values: dict[tuple[str, str, str], float], file: Path) -> None:
    """Draw every metric relative to stock over the ratio; absolute values where stock was not run.

    Raises:
        ValueError: there is no trimmed run to draw.
    """
    from matplotlib.figure import Figure

    caches, columns = rows_and_columns(values)
    trimmed = [cache for cache in caches if cache != STOCK]
    if not trimmed:
        raise ValueError("there is no trimmed run among the result files")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for column in columns:
        stock = values.get((STOCK, *column))
        points = [(cache, values[cache, *column]) for cache in trimmed if (cache, *column) in values]
        heights = [100 * value / stock if stock else value for _, value in points]
        axes.plot([cache for cache, _ in points], heights, marker="o", label=": ".join(column))
    axes.axhline(100, color="gray", linewidth=0.8, linestyle="--")
    axes.set_xlabel("cache (top_k_ratio)")
    axes.set_ylabel("% of stock")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compare lmms-eval results of stock and trimmed runs.")
    parser.add_argument("results", nargs="+", type=Path, help="result files, or folders to search")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="files to write, without ending")
    given = parser.parse_args(arguments)
    try:
        values = newest(read_runs(given.results))
        table = markdown(values)
        plot(values, given.out.with_name(f"{given.out.name}.png"))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    entries = [{"cache": c, "task": t, "metric": m, "value": value} for (c, t, m), value in values.items()]
    given.out.with_name(f"{given.out.name}.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    given.out.with_name(f"{given.out.name}.md").write_text(table, encoding="utf-8")
    print(table, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
