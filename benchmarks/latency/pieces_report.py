"""Table of `benchmarks.latency.pieces`."""

from __future__ import annotations

from typing import Any

from benchmarks.common.tables import milliseconds, table


def tables(result: dict[str, Any]) -> str:
    """Time in pieces over the time of the whole."""
    lines = []
    for case in result["rows"]:
        for row in case["rows"]:
            ratio, (low, high) = row["ratio"], row["ratio_interval"]
            lines.append(
                [
                    f"{case['shape']}, batch {case['batch']}",
                    row["way"],
                    str(row["pieces"]),
                    milliseconds(row["seconds"]["median"]),
                    f"{ratio['median']:.3f} ({low:.3f} … {high:.3f})",
                    str(case["turns"]),
                ]
            )
    header = ["model, pages", "way", "pieces", "prefill, ms", "over whole, median (95 % interval)", "turns"]
    return "Time of the prefill, read in pieces and whole:\n\n" + table(header, lines)


def cost(results: dict[str, dict[str, Any]]) -> str:
    """Reading in pieces over reading whole, a range a model."""
    found: dict[str, list[tuple[int, float]]] = {}
    for case in results["pieces_latency"]["rows"]:
        ratio = next(row["ratio"]["median"] for row in case["rows"] if row["way"] == "in pieces")
        found.setdefault(case["shape"], []).append((case["batch"], ratio))
    words = [
        f"{min(ratio for _, ratio in own):.2f} … {max(ratio for _, ratio in own):.2f} ({shape}, "
        f"{min(own)[0]} to {max(own)[0]} pages)"
        for shape, own in found.items()
    ]
    return f"- A prefill in pieces takes, of its time whole: {'; '.join(words)}.\n"
