"""Table and plot of `benchmarks.memory.pieces`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.common.figures import save
from benchmarks.common.tables import table
from trim_plugin.cache.report import format_bytes


def tables(result: dict[str, Any]) -> str:
    """Peaks against the batch, the planner's beside them, ratios, and what fits."""
    good = [row for row in result["rows"] if "error" not in row]
    found = {(row["way"], row["batch"]): row for row in good}
    local, others = result["vision_layers"]
    parts = [
        f"Model: {result['shape']}, vision tower with {local} + {others} layers, weights {format_bytes(result['weights'])}; "
        f"{100 * result['kept']:.0f} % of the visual tokens kept, pictures of 4 tiles, one a sample.\n",
        "Peak of one `generate` over the loaded weights, and what the planner says:\n",
    ]
    ways = list(dict.fromkeys(row["way"] for row in good))
    lines = []
    for batch in sorted({row["batch"] for row in good}):
        cells = []
        for way in ways:
            row = found.get((way, batch))
            cells.append("–" if row is None else f"{format_bytes(_peak(row))} ({format_bytes(row['planned'])})")
        lines.append([str(batch), *cells])
    parts.append(table(["batch", *ways], lines))
    ratios = sorted(row["planned"] / _peak(row) for row in good)
    if ratios:
        middle = ratios[len(ratios) // 2]
        parts.append(f"Planned / measured: {ratios[0]:.2f} … {middle:.2f} … {ratios[-1]:.2f} in {len(ratios)} cases.\n")
    parts += [f"- {line}\n" for line in _ratios(found)]
    if result["fits"]:
        parts.append(f"\nThe largest batch within {format_bytes(result['limit'])} over the weights, found by trying:\n")
        parts.append(
            table(
                ["way", "largest batch", "tried"],
                [
                    [
                        fit["way"],
                        f"{fit['largest']}" if fit["largest"] < result["most"] else f"at least {fit['largest']}",
                        ", ".join(f"{batch} {'yes' if fits else 'no'}" for batch, fits in fit["tried"]),
                    ]
                    for fit in result["fits"]
                ],
            )
        )
    failed = [row for row in result["rows"] if "error" in row]
    parts += [f"- failed: {row['way']}, batch {row['batch']}: {row['error']}\n" for row in failed]
    return "\n".join(parts)


def _peak(row: dict[str, Any]) -> int:
    return max(1, row["peak"] - row["before"])


def _ratios(found: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    lines = []
    for batch in (8, 16):
        if ("stock", batch) in found and ("in pieces", batch) in found:
            share = _peak(found["in pieces", batch]) / _peak(found["stock", batch])
            lines.append(f"batch {batch}, in pieces over stock: {share:.2f}")
    if ("in pieces", 8) in found and ("in pieces", 32) in found:
        growth = _peak(found["in pieces", 32]) / _peak(found["in pieces", 8])
        lines.append(f"in pieces, batch 32 over batch 8: {growth:.2f}")
    return lines


def plots(result: dict[str, Any], assets: Path) -> list[Path]:
    """Peak against the batch."""
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    good = [row for row in result["rows"] if "error" not in row]
    for way in dict.fromkeys(row["way"] for row in good):
        own = sorted((row["batch"], _peak(row) / 2**30) for row in good if row["way"] == way)
        axes.plot([batch for batch, _ in own], [size for _, size in own], marker="o", label=way)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch (one picture of four tiles each)")
    axes.set_ylabel("peak over the weights, GiB")
    axes.legend(fontsize=7)
    return [save(figure, assets / "pieces.png")]
