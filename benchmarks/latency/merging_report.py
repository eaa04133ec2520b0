"""Tables of `benchmarks.latency.merging`."""

from __future__ import annotations

from typing import Any

from benchmarks.common.scenarios import SCENARIOS
from benchmarks.common.tables import milliseconds, percent, table
from trim_plugin.cache.report import format_bytes


def tables(result: dict[str, Any]) -> str:
    """Decoding merged and dropped, and what choosing and merging cost beside a prefill."""
    parts = [
        f"Decoding with {percent(result['kept'], 0)} of the visual tokens kept; ratios are taken step by step (compiled: "
        "generation by generation), with a 95 % interval of the median:\n",
        table(
            [
                "model",
                "scenario",
                "batch",
                "decoding",
                "dropped, ms a step",
                "dropped again / dropped",
                "merged / dropped",
            ],
            [_decoding_row(case) for case in result["decoding"]],
        ),
    ]
    if result["choosing"]:
        parts += _choosing(result["choosing"])
    return "\n".join(parts)


def cost(results: dict[str, dict[str, Any]]) -> str:
    """The range of merged over dropped decoding, and the noise."""
    ratios: dict[str, list[float]] = {"merged": [], "dropped again": []}
    for case in results["merging"]["decoding"]:
        for row in case["rows"]:
            ratios.setdefault(row["way"], []).append(row["ratio"]["median"])
    merged, noise = (f"{min(ratios[way]):.2f} … {max(ratios[way]):.2f}" for way in ("merged", "dropped again"))
    text = (
        f"- Decoding over merged tokens takes {merged} of the time over as many dropped ones (noise {noise}; "
        f"{len(ratios['merged'])} cases)"
    )
    if choosing := results["merging"]["choosing"]:
        seconds = sum(row["seconds"]["median"] for row in choosing["rows"])
        text += f"; k-center and merging take {percent(seconds / choosing['prefill']['whole'])} of an 11B prefill"
    return text + ".\n"


def _decoding_row(case: dict[str, Any]) -> list[str]:
    rows = {row["way"]: row for row in case["rows"]}
    ratios = [
        f"{row['ratio']['median']:.3f} ({row['interval'][0]:.3f} … {row['interval'][1]:.3f})"
        for row in (rows["dropped again"], rows["merged"])
    ]
    seconds = milliseconds(rows["dropped"]["step_seconds"]["median"])
    return [case["shape"], SCENARIOS[case["scenario"]].title, str(case["batch"]), case["how"], seconds, *ratios]


def _choosing(found: dict[str, Any]) -> list[str]:
    prefill = found["prefill"]
    whole = prefill["whole"]
    rows = [
        [
            row["part"],
            f"{row['launches']:,}",
            format_bytes(row["bytes"]),
            milliseconds(row["seconds"]["median"]),
            percent(row["seconds"]["median"] / whole, 2),
        ]
        for row in found["rows"]
    ]
    seconds = sum(row["seconds"]["median"] for row in found["rows"])
    launches, touched = (sum(row[key] for row in found["rows"]) for key in ("launches", "bytes"))
    rows.append(
        ["together", f"{launches:,}", format_bytes(touched), milliseconds(seconds), percent(seconds / whole, 2)]
    )
    return [
        f"One page, {found['tokens']:,} visual tokens of width {found['width']:,}, {found['kept']} kept, beside the prefill of "
        f"a whole 11B model: {whole:.0f} s by its layers on this machine ({prefill['self']:.2f} s a self-attention layer, "
        f"{prefill['cross']:.2f} s a cross-attention layer, {prefill['vision']:.2f} s a layer of the vision tower):\n",
        table(["part", "operations", "bytes read and written", "ms", "of the prefill"], rows),
    ]
