"""Tables and plots of `benchmarks.latency.measure`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.common.figures import save
from benchmarks.common.scenarios import SCENARIOS
from benchmarks.common.tables import folded, milliseconds, percent, table
from trim_plugin.cache.report import format_bytes

RATIOS = ("stock again", "exact", "kept 0.5", "kept 0.25", "kept 0.1")


def tables(result: dict[str, Any]) -> str:
    """Decoding and prefill by shape, and what scoring costs."""
    parts = []
    for shape in dict.fromkeys(row["shape"] for row in result["rows"]):
        cases = [case for case in result["rows"] if case["shape"] == shape]
        parts += [
            f"### {shape} ({result['dtype'][shape]})\n",
            "A decoding step's time over stock's, median; in brackets the 95 % interval of stock against itself:\n",
            _ratios(cases),
            folded(f"Every figure of {shape}", _figures(cases)),
        ]
    parts.append(_verdict(result))
    parts.append("### What scoring costs (one page, one sample)\n")
    parts.append(
        table(
            [
                "shape",
                "scoring, ms",
                "a self-attention layer, ms",
                "a cross-attention layer, ms",
                "share of 40 layers' prefill",
                "scratch",
            ],
            [
                [
                    row["shape"],
                    milliseconds(row["seconds"]["median"]),
                    milliseconds(row["layer_seconds"]["self"]),
                    milliseconds(row["layer_seconds"]["cross"]),
                    percent(row["share_of_40_layers"], 2) if "share_of_40_layers" in row else "–",
                    format_bytes(row["scratch_bytes"]),
                ]
                for row in result["scoring"]
            ],
        )
    )
    return "\n".join(parts)


def _ratios(cases: list[dict[str, Any]]) -> str:
    lines = []
    for case in cases:
        rows = {row["way"]: row for row in case["rows"]}
        low, high = rows["stock again"]["step_ratio_interval"]
        ratios = [
            f"{rows[way]['step_ratio']['median']:.3f}" + (f" [{low:.3f} … {high:.3f}]" if way == "stock again" else "")
            if way in rows
            else "–"
            for way in RATIOS
        ]
        stock = rows["stock"]["step_seconds"]["median"]
        lines.append([SCENARIOS[case["scenario"]].title, str(case["batch"]), milliseconds(stock), *ratios])
    return table(["scenario", "batch", "stock, ms", *RATIOS], lines)


def _figures(cases: list[dict[str, Any]]) -> str:
    header = [
        "scenario",
        "batch",
        "way",
        "step, ms",
        "tokens/s",
        "step / stock (95 % interval of the median; quartiles)",
        "roofline",
        "roofline reached",
        "prefill, ms",
        "prefill / stock",
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
    return table(header, lines)


def slower_than_stock(case: dict[str, Any], way: str = "exact") -> bool:
    """Whether a way's decoding step is slower than stock's beyond the noise, the interval of stock against itself."""
    intervals = {row["way"]: row["step_ratio_interval"] for row in case["rows"]}
    return way in intervals and intervals[way][0] > max(1.0, intervals["stock again"][1])


def _verdict(result: dict[str, Any]) -> str:
    cases = result["rows"]
    slower = [
        f"{case['shape']}, {case['scenario']}, batch {case['batch']}" for case in cases if slower_than_stock(case)
    ]
    exact = f"Exact mode decodes slower than stock beyond the noise in {len(slower)} of {len(cases)} cases"
    text = exact + (f": {'; '.join(slower)}.\n" if slower else ".\n")
    trimmed = [
        row["roofline_share"]
        for case in cases
        if case["shape"] != "small"
        for row in case["rows"]
        if row["way"].startswith("kept")
    ]
    if trimmed:
        reached = sum(share >= 0.9 for share in trimmed)
        text += (
            f"\nAt random shapes trimmed ways reach 0.9 of the roofline's ratio in {reached} of {len(trimmed)} cases.\n"
        )
    return text


def plots(result: dict[str, Any], assets: Path) -> list[Path]:
    """Step time over stock's beside the roofline."""
    written = []
    for shape in dict.fromkeys(row["shape"] for row in result["rows"]):
        own = [case for case in result["rows"] if case["shape"] == shape]
        ways = ["stock again", "exact", "kept 0.5", "kept 0.25", "kept 0.1"]
        figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
        width = 0.8 / len(ways)
        for number, way in enumerate(ways):
            places, heights, errors, roofs = [], [], [[], []], []
            for place, case in enumerate(own):
                row = next((row for row in case["rows"] if row["way"] == way), None)
                if row is None:
                    continue
                middle = row["step_ratio"]["median"]
                places.append(place + number * width - 0.4 + width / 2)
                heights.append(middle)
                errors[0].append(max(0.0, middle - row["step_ratio_interval"][0]))
                errors[1].append(max(0.0, row["step_ratio_interval"][1] - middle))
                roofs.append(row["roofline_ratio"])
            axes.bar(places, heights, width, yerr=errors, error_kw={"lw": 0.6}, label=way)
            axes.scatter(
                places, roofs, marker="_", color="black", s=25, zorder=3, label="roofline" if number == 0 else None
            )
        axes.axhline(1.0, color="grey", lw=0.6)
        axes.set_xticks(range(len(own)), [f"{case['scenario']}\n{case['batch']}" for case in own], fontsize=7)
        axes.set_ylabel("step time / stock's")
        axes.set_title(f"{shape}: a decoding step, by scenario and batch size", fontsize=10)
        axes.legend(fontsize=7, ncols=3)
        written.append(save(figure, assets / f"latency-{shape}.png"))
    return written
