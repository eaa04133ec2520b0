"""Tables and plots of `benchmarks.memory.measure`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.common.figures import save
from benchmarks.common.scenarios import SCENARIOS
from benchmarks.common.tables import folded, percent, table
from trim_plugin.cache.report import format_bytes

#: Caches that every kind of weights was measured with.
COMBINED = ("stock dynamic", "exact", "ratio 0.25", "kept 0.25", "ratio 0.25, nf4 KV", "kept 0.25, nf4 KV")


def tables(result: dict[str, Any]) -> str:
    """Held bytes and peaks, the planner's errors, and what failed."""
    good = [row for row in result["rows"] if "error" not in row]
    parts = []
    for shape in dict.fromkeys(row["shape"] for row in good):
        own = [row for row in good if row["shape"] == shape]
        parts += [f"### {shape}\n", "Cross KV held while decoding, one sample:\n", _cross_kv(own)]
        combined = [row for row in own if (row["scenario"], row["batch"]) == ("page", 1) and row["cache"] in COMBINED]
        parts += ["One document page, by weights and adapter:\n", _cases(combined)]
        parts.append(folded(f"Every case of {shape}", _cases(own)))
    planned = [row for row in good if "planned" in row]
    if planned:
        parts.append("### The planner against these measurements\n")
        parts.append(_planner_table(planned))
    failed = [row for row in result["rows"] if "error" in row]
    if failed:
        parts.append("Failed cases:\n")
        parts += [
            f"- {row['shape']}, {row['scenario']}, batch {row['batch']}, {row['weights']}, {row['cache']}: {row['error']}"
            for row in failed
        ]
        parts.append("")
    return "\n".join(parts)


def _cross_kv(rows: list[dict[str, Any]]) -> str:
    plain = [row for row in rows if row["batch"] == 1 and not row["lora"] and row["weights"] in ("float32", "bfloat16")]
    names = [name for name in SCENARIOS if any(row["scenario"] == name for row in plain)]
    found = {(row["cache"], row["scenario"]): format_bytes(row["cross_kv"]) for row in plain}
    caches = dict.fromkeys(row["cache"] for row in plain)
    lines = [[cache, *(found.get((cache, name), "–") for name in names)] for cache in caches]
    return table(["cache", *(SCENARIOS[name].title for name in names)], lines)


def _cases(rows: list[dict[str, Any]]) -> str:
    header = [
        "scenario",
        "batch",
        "weights",
        "LoRA",
        "cache",
        "weights held",
        "adapters",
        "cross KV",
        "self KV",
        "peak of generation",
        "process peak",
    ]
    lines = [
        [
            SCENARIOS[row["scenario"]].title,
            str(row["batch"]),
            row["weights"],
            "yes" if row["lora"] else "no",
            row["cache"],
            format_bytes(sum(row["weights_by_part"].values())),
            format_bytes(row["adapters"]),
            format_bytes(row["cross_kv"]),
            format_bytes(row["self_kv"]),
            format_bytes(row["peak"] - row["before"]),
            format_bytes(row["peak"]),
        ]
        for row in rows
    ]
    return table(header, lines)


def _planner_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for shape, weights in dict.fromkeys((row["shape"], row["weights"]) for row in rows):
        own = [row["planned"] for row in rows if (row["shape"], row["weights"]) == (shape, weights)]
        dynamic = [
            row for row in rows if (row["shape"], row["weights"]) == (shape, weights) and row["cache"] != "stock static"
        ]
        ratios = sorted(plan["generation"] / max(1, plan["generation_measured"]) for plan in own)
        lines.append(
            [
                f"{shape}, {weights}",
                str(len(own)),
                percent(max(abs(plan["weights_error"]) for plan in own), 2),
                f"{max(abs(plan['cross_kv_error']) for plan in own)} B",
                f"{max((abs(row['planned']['self_kv'] - row['self_kv']) for row in dynamic), default=0)} B",
                f"{ratios[0]:.2f} … {ratios[len(ratios) // 2]:.2f} … {ratios[-1]:.2f}",
            ]
        )
    header = [
        "shape, weights",
        "cases",
        "largest error of weights",
        "of cross KV",
        "of self KV",
        "peak of generation, planned / measured (lowest … median … highest)",
    ]
    return table(header, lines)


def plots(result: dict[str, Any], assets: Path) -> list[Path]:
    """Cross KV by scenario and cache."""
    written = []
    for shape in dict.fromkeys(row["shape"] for row in result["rows"]):
        own = [
            row
            for row in result["rows"]
            if row["shape"] == shape
            and "error" not in row
            and row["batch"] == 1
            and not row["lora"]
            and row["weights"] in ("float32", "bfloat16")
        ]
        wanted = [name for name in dict.fromkeys(row["cache"] for row in own) if name != "stock static"]
        names = [name for name in SCENARIOS if any(row["scenario"] == name for row in own)]
        if not names:
            continue
        figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
        width = 0.8 / len(wanted)
        for number, cache in enumerate(wanted):
            found = {row["scenario"]: row["cross_kv"] / 2**20 for row in own if row["cache"] == cache}
            places = [n + number * width - 0.4 + width / 2 for n, name in enumerate(names) if name in found]
            axes.bar(places, [found[name] for name in names if name in found], width, label=cache)
        axes.set_xticks(range(len(names)), names)
        axes.set_yscale("log")
        axes.set_ylabel("cross KV, MiB")
        axes.set_title(f"{shape}: cross-attention KV held while decoding, one sample", fontsize=10)
        axes.legend(fontsize=7, ncols=2)
        written.append(save(figure, assets / f"memory-{shape}.png"))
    return written
