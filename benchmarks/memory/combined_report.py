"""Tables and plot of `benchmarks.memory.combined`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.figures import bars, colour, panels, save
from benchmarks.common.tables import table
from trim_plugin.cache.report import format_bytes

NAMES = {"bf16": "bf16", "int8": "8 bits", "nf4": "4 bits (nf4)"}
#: Way → how somebody who has read nothing yet is told of it.
SERVED = {
    "stock": "transformers alone",
    "exact": "exact mode",
    "default": "default",
    "KCenter(0.1), nf4 KV": "a tenth kept, in 4 bits",
}


def tables(result: dict[str, Any]) -> str:
    """Every combination."""
    lines = [
        [
            row["weights"],
            "yes" if row["adapter"] else "no",
            row["way"],
            *(format_bytes(row[name]) for name in ("weights_bytes", "cross_kv", "self_kv", "peak")),
            str(row["largest_batch"]),
            row["limit"],
        ]
        for row in result["rows"]
    ]
    at = f"at batch {result['batch']}"
    header = ["weights", "LoRA", "cache", "weights held", f"cross KV {at}", f"self KV {at}", f"peak {at}"]
    memory, reserve = format_bytes(result["memory"]), format_bytes(result["reserve"])
    return (
        f"*Calculated* for the 11B model, a page of 4 tiles a sample; the largest batch is what fits in {memory}, of which "
        f"{reserve} is left free.\n\n" + table([*header, "largest batch", "what limits it"], lines)
    )


def fits(results: dict[str, dict[str, Any]]) -> str:
    """The largest batch and the peak, by weights and cache, without an adapter; then what the adapter changes."""
    result = results["combined"]
    found = {(row["weights"], row["way"], row["adapter"]): row for row in result["rows"]}
    ways = list(dict.fromkeys(row["way"] for row in result["rows"]))
    lines = [
        [
            NAMES[weights],
            *(
                f"{found[weights, way, False]['largest_batch']} ({found[weights, way, False]['peak'] / 2**30:.1f})"
                for way in ways
            ),
        ]
        for weights in NAMES
    ]
    text = table(["weights", *ways], lines)
    if result["adapter"] is None:
        return text
    fewer = max(
        row["largest_batch"] - found[row["weights"], row["way"], True]["largest_batch"]
        for row in result["rows"]
        if not row["adapter"]
    )
    return text + (
        f"\nA LoRA adapter of rank 16 adds {format_bytes(result['adapter'])}: at most {fewer} samples fewer.\n"
    )


def plots(result: dict[str, Any], assets: Path) -> list[Path]:
    """The largest batch, by weights and cache."""
    rows = [row for row in result["rows"] if not row["adapter"]]
    figure, axes = panels(3.9)
    ways = {
        way: [float(row["largest_batch"]) for row in rows if row["way"] == way]
        for way in dict.fromkeys(row["way"] for row in rows)
    }
    bars(axes, list(NAMES.values()), ways, ".0f")
    axes.set_title("Pages that one generate call can read in 24 GiB,\n11B model (calculated)")
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    return [save(figure, assets / "combined.png", legend=2), _plot_served(rows, assets / "served.png")]


def _plot_served(rows: list[dict[str, Any]], path: Path) -> Path:
    """How many are answered at once in 4 bits: the first page's plot."""
    figure, axes = panels(1.9)
    for place, row in enumerate(row for row in rows if row["weights"] == "nf4"):
        drawn = axes.barh(place, row["largest_batch"], 0.75, color=colour(row["way"]))
        axes.bar_label(drawn, padding=3)
    axes.set_yticks(range(place + 1), [SERVED[row["way"]] for row in rows if row["weights"] == "nf4"])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_title("Users answered at once on a 24 GiB card (predicted)")
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.margins(x=0.1)
    return save(figure, path)
