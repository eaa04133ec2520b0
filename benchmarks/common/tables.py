"""Markdown tables and numbers as the benchmark pages show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns after the first are right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def percent(value: float, digits: int = 1) -> str:
    """A share as "12.3 %"."""
    return f"{100 * value:.{digits}f} %"


def milliseconds(value: float) -> str:
    """Seconds as milliseconds, three digits."""
    return f"{1000 * value:.3g}" if value < 1 else f"{1000 * value:.0f}"
