"""Tables of `benchmarks.latency.compiled`."""

from __future__ import annotations

from typing import Any

from benchmarks.common.scenarios import SCENARIOS
from benchmarks.common.tables import milliseconds, table
from trim_plugin.cache.report import format_bytes


def tables(result: dict[str, Any]) -> str:
    """Time per token of the four ways, and bytes of the static form."""
    parts = []
    for row in result["rows"]:
        parts.append(
            f"{result['shape']} model, {SCENARIOS[row['scenario']].title}, batch {row['batch']}, {row['new_tokens']} new tokens, "
            f"trimmed ways keep {100 * result['kept']:.0f} % of the visual tokens, `static_bucket={result['bucket']}`:\n"
        )
        parts.append(
            table(
                ["way", "ms per token", "faster than stock eager", "first generation, compiling, s"],
                [
                    [
                        way["way"],
                        milliseconds(way["step_seconds"]["median"]),
                        f"{way['times_stock_eager']['median']:.2f}× ({way['times_stock_eager']['low']:.2f} … "
                        f"{way['times_stock_eager']['high']:.2f})",
                        f"{way['first_generation_seconds']:.1f}",
                    ]
                    for way in row["rows"]
                ],
            )
        )
        parts.append(
            f"Same tokens compiled as eager: stock {100 * row['same_tokens']['stock']:.0f} %, trimmed "
            f"{100 * row['same_tokens']['trimmed']:.0f} %.\n"
        )
    header = ["scenario", "kept tokens", "cross KV, stock", "cross KV, dynamic", "cross KV, static"]
    header += ["cross KV, static, int8", "self KV, dynamic", "self KV, static"]
    lines = [
        [
            SCENARIOS[row["scenario"]].title,
            str(row["kept_tokens"]),
            format_bytes(row["stock_cross_kv"]),
            format_bytes(row["dynamic"]["cross_kv"]),
            format_bytes(row["static"]["cross_kv"]),
            format_bytes(row["static, int8"]["cross_kv"]) if "static, int8" in row else "–",
            format_bytes(row["dynamic"]["self_kv"]),
            format_bytes(row["static"]["self_kv"]),
        ]
        for row in result["memory"]
    ]
    held = (
        "Bytes held after the prompt, with room for 64 tokens (static self-attention layers hold that room at once):\n"
    )
    return "\n".join([*parts, held, table(header, lines)])


def faster(results: dict[str, dict[str, Any]]) -> str:
    """How much faster compiled decoding is, for the smallest and the largest cache."""
    cases = [row for row in results["compiled"]["rows"] if row["batch"] == 1]
    found = []
    for row in (cases[0], cases[-1]):
        ways = {way["way"]: way["times_stock_eager"]["median"] for way in row["rows"]}
        found.append(
            f"{SCENARIOS[row['scenario']].title.split(' (')[0]} {ways['trimmed compiled']:.1f} times, stock's static cache "
            f"{ways['stock static compiled']:.1f}"
        )
    return f"- Compiled, the small model decodes faster than stock eager: {'; '.join(found)}.\n"
