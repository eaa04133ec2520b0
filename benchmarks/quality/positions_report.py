"""Table of `benchmarks.quality.positions`."""

from __future__ import annotations

import itertools
from typing import Any

from benchmarks.common.tables import percent, table
from benchmarks.quality.positions import STARTS
from benchmarks.quality.report import MISSING

Row = dict[str, Any]


def tables(result: dict[str, Any]) -> str:
    """A line a rule, chosen once and anew; a column a stretch of positions."""
    ends = [f"tokens {start + 1} – {end}" for start, end in itertools.pairwise(STARTS)]
    header = ["rule", "parameter", "chosen", *ends, f"from {STARTS[-1] + 1} on"]
    rows: dict[tuple[str, float, bool], dict[int, Row]] = {}
    for row in result["rows"]:
        rows.setdefault((row["rule"], row["parameter"], row["anew"]), {})[row["from"]] = row
    counts = {row["from"]: row["tokens"] for row in result["rows"]}
    numbers = ", ".join(f"{counts[start]:,}" for start in STARTS if start in counts)
    intro = (
        f"{result['scenes']} answers to questions of type *{result['kind']}*; tokens in each stretch: {numbers}.\n\n"
    )
    return intro + table(header, (_line(*key, found) for key, found in rows.items()))


def _line(rule: str, parameter: float, anew: bool, found: dict[int, Row]) -> list[str]:
    shares = [_share(found[start]) if start in found else MISSING for start in STARTS]
    return [rule, f"{parameter:g}", "for every token" if anew else "once", *shares]


def _share(row: Row) -> str:
    low, high = row["agreement_interval"]
    return f"{percent(row['agreement'], 2)} ({100 * low:.2f} … {100 * high:.2f})"
