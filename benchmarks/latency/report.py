"""Tables and plot of `benchmarks.latency.measure`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.figures import bars, panels, save
from benchmarks.common.scenarios import SCENARIOS
from benchmarks.common.tables import milliseconds, percent, table
from trim_plugin.cache.report import format_bytes

#: Shown on the page to decide by: scenario and batch of layers of the 11B model's widths.
SHOWN = {
    ("page", 1): "one page",
    ("pages", 1): "8 pages in a row",
    ("page", 16): "16 pages, a sample each",
    ("video", 1): "32 video frames",
}
WAYS = {"exact": "exact", "kept 0.25": "a quarter of the tokens"}


def tables(result: dict[str, Any]) -> str:
    """Decoding and prefill by shape, and what scoring costs."""
    parts = [verdict({"latency": result})]
    for shape in dict.fromkeys(row["shape"] for row in result["rows"]):
        cases = [case for case in result["rows"] if case["shape"] == shape]
        parts += [f"### {shape} ({result['dtype'][shape]})\n", _figures(cases)]
    header = ["shape", "scoring, ms", "a self-attention layer, ms", "a cross-attention layer, ms"]
    lines = [
        [
            row["shape"],
            milliseconds(row["seconds"]["median"]),
            milliseconds(row["layer_seconds"]["self"]),
            milliseconds(row["layer_seconds"]["cross"]),
            percent(row["share_of_40_layers"], 2) if "share_of_40_layers" in row else "–",
            format_bytes(row["scratch_bytes"]),
        ]
        for row in result["scoring"]
    ]
    scoring = table([*header, "share of 40 layers' prefill", "scratch"], lines)
    return "\n".join([*parts, "### What scoring costs (one page, one sample)\n", scoring])


def _figures(cases: list[dict[str, Any]]) -> str:
    header = [
        "scenario",
        "batch",
        "way",
        "step, ms",
        "tokens/s",
        "step / stock (95 % interval of the median; quartiles)",
    ]
    lines = []
    for case in cases:
        for row in case["rows"]:
            ratio, interval = row["step_ratio"], "{:.3f} … {:.3f}".format(*row["step_ratio_interval"])
            lines.append(
                [
                    SCENARIOS[case["scenario"]].title,
                    str(case["batch"]),
                    row["way"],
                    milliseconds(row["step_seconds"]["median"]),
                    f"{row['tokens_per_second']:.3g}",
                    f"{ratio['median']:.3f} ({interval}; {ratio['low']:.3f} … {ratio['high']:.3f})",
                    f"{row['roofline_ratio']:.3f}",
                    f"{row['roofline_share']:.2f}",
                    milliseconds(row["prefill_seconds"]["median"]),
                    f"{row['prefill_ratio']['median']:.3f}",
                ]
            )
    return table([*header, "roofline", "roofline reached", "prefill, ms", "prefill / stock"], lines)


def slower_than_stock(case: dict[str, Any], way: str = "exact") -> bool:
    """Whether a way's decoding step is slower than stock's beyond the noise, the interval of stock against itself."""
    intervals = {row["way"]: row["step_ratio_interval"] for row in case["rows"]}
    return way in intervals and intervals[way][0] > max(1.0, intervals["stock again"][1])


def verdict(results: dict[str, dict[str, Any]]) -> str:
    """Where exact mode is slower than stock, and how near trimmed ways come to what reading memory allows."""
    cases = results["latency"]["rows"]
    slower = [
        f"{case['shape']}, {case['scenario']}, batch {case['batch']}" for case in cases if slower_than_stock(case)
    ]
    exact = f"- Exact mode decodes slower than stock beyond the noise in {len(slower)} of {len(cases)} cases"
    return exact + (f": {'; '.join(slower)}.\n" if slower else ".\n")


def _shown(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Title → way → row, of what the page shows."""
    cases = {(case["scenario"], case["batch"]): case for case in result["rows"] if case["shape"] == "11b-layers"}
    return {
        title: {row["way"]: row for row in cases[place]["rows"]} for place, title in SHOWN.items() if place in cases
    }


def decoding(results: dict[str, dict[str, Any]]) -> str:
    """A decoding step's time over stock's and the noise, for the first page: a line a scenario."""
    lines = []
    for title, rows in _shown(results["latency"]).items():
        exact, quarter = (f"{rows[way]['step_ratio']['median']:.2f}" for way in WAYS)
        low, high = rows["stock again"]["step_ratio_interval"]
        lines.append(f"- {title}: {exact} exact, {quarter} with a quarter kept (stock again {low:.2f} … {high:.2f})\n")
    return "".join(lines)


def plots(result: dict[str, Any], assets: Path) -> list[Path]:
    """Step time over stock's, at the 11B model's widths."""
    shown = _shown(result)
    if not shown:
        return []
    figure, axes = panels(4.2)
    ways = {
        title: [rows[way]["step_ratio"]["median"] for rows in shown.values()]
        for way, title in (("stock again", "stock again (noise)"), *WAYS.items())
    }
    bars(axes, [title.replace(", ", ",\n") for title in shown], ways, ".2f")
    axes.axvline(1.0, color="0.3", lw=0.8, zorder=1)
    axes.set_xlabel("time of a decoding step / stock's; shorter is faster")
    return [save(figure, assets / "latency.png", legend=3)]
