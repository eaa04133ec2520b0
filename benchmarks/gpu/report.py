"""Tables of `benchmarks.gpu.predicted`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.common.cost import DEVICES
from benchmarks.common.tables import milliseconds, percent, table

OWN = ("scoring", "choosing", "merging", "own work")


def tables(result: dict[str, Any]) -> str:
    """All rows."""
    about = f"One page of {result['visual_tokens']:,} visual tokens, {result['text_rows']} text tokens, bf16."
    kinds = {"prefill": ("prefill",), "step": ("step",), "own": OWN}
    found = {kind: [row for row in result["rows"] if row["part"] in parts] for kind, parts in kinds.items()}
    return "\n".join(
        [
            f"{about} **Predicted, not measured.**\n",
            "### A prefill\n\n" + _table(found["prefill"], "of stock's"),
            "### What is added to a prefill\n\n" + _table(found["own"], "of stock's prefill"),
            "### A decoding step\n\n" + _table(found["step"], "of stock's"),
            "### The vision tower on fewer patches\n\n" + _table(result["tower"], "of the untouched tower's"),
        ]
    )


def _table(rows: Iterable[dict[str, Any]], of: str) -> str:
    rows = list(rows)
    tiled = any("tiles" in row for row in rows)
    header = ["way", *(["tiles"] if tiled else []), "part", "launches", "GB moved", "TFLOP"]
    header += [f"{device}: ms" for device in DEVICES] + [f"{device}: {of}" for device in DEVICES]
    return table(
        header,
        [
            [
                row["way"],
                *([str(row["tiles"])] if tiled else []),
                row["part"],
                f"{row['launches']:,}",
                f"{row['bytes'] / 1e9:.2f}",
                f"{row['operations'] / 1e12:.3f}",
                *(milliseconds(row["seconds"][device]) for device in DEVICES),
                *(percent(row["share"][device]) for device in DEVICES),
            ]
            for row in rows
        ],
    )


def own_work(results: dict[str, dict[str, Any]]) -> str:
    """What trim_plugin adds to a prefill, and what a prefill and a step then take."""
    rows = results["predicted"]["rows"]
    found = {(row["part"], row["way"]): row for row in rows}
    ways = [row["way"] for row in rows if row["part"] == "own work"]
    header = ["way", "launches added"]
    header += [f"{device}: added" for device in DEVICES]
    header += [f"{device}: {what}" for what in ("prefill", "step") for device in DEVICES]
    lines = []
    for way in ways:
        own = found["own work", way]
        whole = [found[what, way]["share"][device] for what in ("prefill", "step") for device in DEVICES]
        lines.append(
            [way, str(own["launches"]), *(percent(own["share"][device]) for device in DEVICES), *map(percent, whole)]
        )
    return table(header, lines)


#: From here on a share is said to pay: what is predicted is not that sure.
PAYS = 1.1


def tower(results: dict[str, dict[str, Any]]) -> str:
    """What the tower takes on fewer patches, and where that pays."""
    rows = results["predicted"]["tower"]
    own = {(row["tiles"], row["way"]): row for row in rows if row["part"] == "own work"}
    shared = [row for row in rows if (row["tiles"], row["way"]) in own and row["part"] == "tower"]
    header = ["tiles", "share", "launches of choosing"]
    header += [f"{device}: times less time" for device in DEVICES]
    lines = [
        [
            str(row["tiles"]),
            row["way"].removeprefix("share "),
            f"{own[row['tiles'], row['way']]['launches']:,}",
            *(f"{1 / row['share'][device]:.2f}" for device in DEVICES),
        ]
        for row in shared
    ]
    verdict = [f"- {device}: {_where_it_pays(shared, device)}\n" for device in DEVICES]
    return table(header, lines) + "\n" + "".join(verdict)


def _where_it_pays(rows: list[dict[str, Any]], device: str) -> str:
    """Which shares make the tower clearly faster, by tiles."""
    said = []
    for tiles in dict.fromkeys(row["tiles"] for row in rows):
        own = [row for row in rows if row["tiles"] == tiles]
        paying = [row["way"].removeprefix("share ") for row in own if 1 / row["share"][device] >= PAYS]
        shares = f"it pays at {', '.join(paying)}" if paying else "it does not pay"
        said.append(f"pictures of {tiles} tile{'s' if tiles > 1 else ''}: {shares}")
    experimental = (
        "" if all("does not" not in one for one in said) else ". Where it does not pay, `tower_share` is experimental"
    )
    return "; ".join(said) + experimental + "."


def beside(measured: dict[str, Any], predicted: dict[str, Any]) -> str:
    """What was measured on a GPU beside what is predicted for another one: milliseconds of a prefill and of a step, by way."""
    found = {(row["part"], row["way"]): row["seconds"] for row in predicted["rows"]}
    figures = measured["figures"]
    names = {"stock": "stock", "ratio 0.1": "kept 0.1", "k-center 0.1": "k-center 0.1", "kept 0.1, merged": "kept 0.1"}
    times = [("prefill", row["way"], row["whole"]) for row in figures.get("prefill", [])]
    times += [("step", row["way"], row["step_seconds"]["median"]) for row in figures.get("decoding, batch 1", [])]
    return table(
        ["part", "way", "measured, ms", *(f"predicted for {device}, ms" for device in DEVICES)],
        [
            [part, way, milliseconds(own), *(milliseconds(found[part, names[way]][device]) for device in DEVICES)]
            for part, way, own in times
            if (part, names.get(way)) in found
        ],
    )
