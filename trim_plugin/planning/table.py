"""Prints what `trim-plugin plan` shows a person: a table with a row for each variant, and sentences on what fits."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from trim_plugin.arithmetic import format_bytes
from trim_plugin.planning.fitting import Fit
from trim_plugin.planning.job import Job
from trim_plugin.planning.planner import Plan

#: Columns of bytes: their heading and the plan's number.
COLUMNS = (
    ("cross KV", "cross_kv"),
    ("self KV", "self_kv"),
    ("reading prompts", "prefill_peak"),
    ("decoding", "decode_peak"),
    ("needed", "needed"),
)


def show(
    console: Console, model: str, job: Job, weights: str, plans: list[Plan], memory: int | None, fits: dict[str, Fit]
) -> None:
    """Print the plans, a row each, and what fits into `memory`: `fits` by the name of the variant, empty without a memory.

    The console takes words as they are (`commands.plain_console`), since a model's name is its user's.
    """
    expanded = f" x {job.expand_size}" if job.expand_size > 1 else ""
    size = format_bytes(plans[0].weights_total)
    title = f"{model}, batch {job.batch}{expanded}, weights in {weights} ({size})"
    console.print(_table(title, plans, fits))
    for line in [*_fitting(job, plans, memory, fits), *_notes(plans)]:
        console.print(line)


def _table(title: str, plans: list[Plan], fits: dict[str, Fit]) -> Table:
    unit, name = (2**30, "GiB") if max(one.peak for one in plans) >= 2**30 else (2**20, "MiB")
    table = Table(
        title=f"{title}; sizes in {name}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    headings = ["tokens kept", *(heading for heading, _ in COLUMNS)]
    # A heading of two words stands in two lines: eight columns shall be read in 80 characters.
    for heading in headings + (["largest batch"] if fits else []):
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for one in plans:
        bounds = ["≤" if field in one.upper_bounds else "" for _, field in COLUMNS]
        sizes = [f"{bound}{getattr(one, field) / unit:.2f}" for bound, (_, field) in zip(bounds, COLUMNS, strict=True)]
        fit = [str(fits[one.variant.name].largest_batch)] if fits else []
        table.add_row(one.variant.name, str(one.kept_tokens), *sizes, *fit)
    return table


def _fitting(job: Job, plans: list[Plan], memory: int | None, fits: dict[str, Fit]) -> list[str]:
    """Sentences: which variants fit, what limits the largest batch, and why not even one sample fits."""
    if memory is None:
        return []
    fitting = [one.variant.name for one in plans if one.needed <= memory]
    others = [one.variant.name for one in plans if one.needed > memory]
    where = f"Batch {job.batch} fits into {format_bytes(memory)}"
    lines = [f"{where} with {', '.join(fitting)}." if fitting else f"{where} with none of them."]
    if fitting and others:
        lines[0] += f" It does not with {', '.join(others)}."
    limits = _by_value({name: fit.limit for name, fit in fits.items() if fit.largest_batch})
    if limits:
        limited = "; ".join(f"{limit} ({', '.join(names)})" for limit, names in limits.items())
        lines.append(f"The largest batch is limited by {limited}.")
    reasons = _by_value({name: fit.reason for name, fit in fits.items() if not fit.largest_batch})
    lines += [f"Not even one sample fits ({', '.join(names)}): {reason}." for reason, names in reasons.items()]
    return lines


def _by_value(values: dict[str, Any]) -> dict[Any, list[str]]:
    """The names of every value.

    Example:
        >>> _by_value({"stock": 1, "exact": 2, "trimmed": 2})
        {1: ['stock'], 2: ['exact', 'trimmed']}
    """
    found: dict[Any, list[str]] = {}
    for name, value in values.items():
        found.setdefault(value, []).append(name)
    return found


def _notes(plans: list[Plan]) -> list[str]:
    first = plans[0]
    calls = _by_value({one.variant.name: one.at_a_time for one in plans})
    read = "; ".join(
        f"{', '.join(names)}: {images} a tower call, {samples} {'sample' if samples == 1 else 'samples'} a text call"
        for (images, samples), names in calls.items()
    )
    parts = ", ".join(f"{name} {format_bytes(count)}" for name, count in first.weights.items())
    shares = ", ".join(
        f"{one.variant.top_k_ratio:g} keeps {100 * one.variant.kept_share:.0f}%"
        for one in plans[2:]
        if one.variant.top_k_ratio is not None and one.variant.kept_share is not None
    )
    notes = [
        f"Weights: {parts}.",
        f"Pictures read at a time: {read}.",
        f"Weights and KV are exact, working memory in the peaks is an estimate; reserve {format_bytes(first.reserve)}.",
    ]
    if any(one.upper_bounds for one in plans):
        notes.append(
            "≤: at most. Micro-batches are counted as if each held the fullest samples, and what a ratio keeps varies, so that "
            "some of what is held is padding. At least the largest batch fits. Tokens kept are the fullest samples'."
        )
    if shares:
        notes.append(
            f"A forecast, as measured on the small model: ratio {shares} of the readable visual tokens. --expect-kept sets it."
        )
    return notes
