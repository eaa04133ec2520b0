"""Table and plot of `benchmarks.memory.pieces`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.figures import colour, panels, save
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


def peaks(results: dict[str, dict[str, Any]]) -> str:
    """Measured peaks of one batch, and how far the planner is from them."""
    rows = [row for row in results["pieces"]["rows"] if "error" not in row]
    found = {(row["way"], row["batch"]): _peak(row) for row in rows}
    both = [batch for way, batch in found if way == "stock" and ("in pieces", batch) in found]
    if not both:
        return ""
    stock, pieces = (found[way, max(both)] for way in ("stock", "in pieces"))
    ratios = sorted(row["planned"] / _peak(row) for row in rows)
    return (
        f"Measured over the weights, {max(both)} pages in one call: {format_bytes(stock)} stock, {format_bytes(pieces)} in "
        f"pieces ({pieces / stock:.2f} of it). The planner's figure was {ratios[0]:.2f} … {ratios[-1]:.2f} of the measured one "
        f"in {len(ratios)} cases.\n"
    )


def plots(result: dict[str, Any], assets: Path) -> list[Path]:
    """Peak against the batch."""
    figure, axes = panels(3.1)
    good = [row for row in result["rows"] if "error" not in row]
    for way in [way for way in ("stock", "in pieces") if any(row["way"] == way for row in good)]:
        own = sorted((row["batch"], _peak(row) / 2**30) for row in good if row["way"] == way)
        axes.plot(*zip(*own, strict=True), marker="o", color=colour(way), label=way)
        axes.annotate(f"{way}, {own[-1][1]:.1f}", own[-1], (0, 8), textcoords="offset points", ha="right")
    axes.set_xlabel("pages in one call")
    axes.set_ylabel("peak over the weights, GiB")
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)
    return [save(figure, assets / "pieces.png")]
