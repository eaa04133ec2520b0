"""Tables of `benchmarks.memory.measure`."""

from __future__ import annotations

from typing import Any

from benchmarks.common.scenarios import SCENARIOS
from benchmarks.common.tables import percent, table
from trim_plugin.cache.report import format_bytes


def tables(result: dict[str, Any]) -> str:
    """Held bytes and peaks, the planner's errors, and what failed."""
    good = [row for row in result["rows"] if "error" not in row]
    parts = []
    for shape in dict.fromkeys(row["shape"] for row in good):
        own = [row for row in good if row["shape"] == shape]
        parts += [f"### {shape}\n", "Cross KV held while decoding, one sample:\n", _cross_kv(own)]
        parts += ["Every case:\n", _cases(own)]
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
