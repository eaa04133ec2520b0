"""What `trim-plugin plan` shows a person: a column for each way to generate, and what fits in sentences."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from trim_plugin.cache.report import format_bytes
from trim_plugin.planning.fitting import Change, Fit
from trim_plugin.planning.job import Job
from trim_plugin.planning.planner import Plan


def show(
    console: Console,
    model: str,
    job: Job,
    plans: list[Plan],
    memory: int | None,
    fits: dict[str, Fit],
    changes: dict[str, Change | None],
) -> None:
    """Print everything.

    Args:
        console: where to.
        model: its name, for the title.
        job: what is generated.
        plans: a column each.
        memory: bytes of the device; None if they don't matter.
        fits: what fits, by the name of the way; empty without `memory`.
        changes: for the ways in which the job does not fit, what would make it fit.
    """
    console.print(_table(model, job, plans, memory, fits))
    for line in _sentences(job, plans, fits, changes):
        console.print(line, highlight=False)
    for line in _notes(plans):
        console.print(line, style="dim", highlight=False)


def _table(model: str, job: Job, plans: list[Plan], memory: int | None, fits: dict[str, Fit]) -> Table:
    copies = f" of {job.copies} copies" if job.copies > 1 else ""
    table = Table(title=f"memory of {model}, batch {job.batch}{copies}", title_justify="left", title_style="bold")
    table.add_column("")
    for one in plans:
        table.add_column(one.way.name, justify="right", no_wrap=True)

    def row(name: str, *cells: str) -> None:
        table.add_row(name, *cells)

    def sizes(field: str) -> list[str]:
        return [format_bytes(getattr(one, field)) for one in plans]

    row("weights", *sizes("weights_total"))
    row("visual tokens held, a sample", *(str(one.kept_tokens) for one in plans))
    row("cross-attention KV", *sizes("cross_kv"))
    row("self-attention KV", *sizes("self_kv"))
    table.add_section()
    row("pictures a tower call", *(str(one.at_a_time[0]) for one in plans))
    row("samples a text call", *(str(one.at_a_time[1]) for one in plans))
    row("peak, reading prompts", *sizes("prefill_peak"))
    row("peak, decoding", *sizes("decode_peak"))
    row("needed, with reserve", *sizes("needed"))
    if memory is not None:
        table.add_section()
        row(f"batch {job.batch} in {format_bytes(memory)}", *("yes" if one.needed <= memory else "no" for one in plans))
        row("largest batch", *(str(fits[one.way.name].largest_batch) for one in plans))
        row("what limits it", *(fits[one.way.name].limit for one in plans))
    return table


def _sentences(job: Job, plans: list[Plan], fits: dict[str, Fit], changes: dict[str, Change | None]) -> list[str]:
    """Why nothing fits, and what would make the job fit: ways of the same sentence in one line."""
    lines: dict[str, list[str]] = {}
    names = [one.way.name for one in plans]
    for name in names:
        if name in fits and fits[name].largest_batch == 0:
            lines.setdefault(f"not even one sample fits: {fits[name].reason}.", []).append(name)
    trimmed = [name for name in names[1:] if name in changes]
    for name in trimmed or [name for name in names[:1] if name in changes]:
        change = changes[name]
        if change is None:
            text = f"no change makes batch {job.batch} fit; generate for fewer samples at a time."
        else:
            words = " and ".join(change.words)
            text = f"batch {job.batch} fits with {words} ({format_bytes(change.needed)} needed then)."
        lines.setdefault(text, []).append(name)
    return [f"{', '.join(own)}: {text}" for text, own in lines.items()]


def _notes(plans: list[Plan]) -> list[str]:
    first = plans[0]
    parts = ", ".join(f"{name} {format_bytes(count)}" for name, count in first.weights.items())
    shares = ", ".join(
        f"{one.way.top_k_ratio:g} keeps {100 * one.way.kept_share:.0f} %"
        for one in plans[2:]
        if one.way.top_k_ratio is not None and one.way.kept_share is not None
    )
    notes = [
        f"Weights: {parts}.",
        f"Weights and KV are exact, working memory in the peaks is an estimate; reserve {format_bytes(first.reserve)}.",
    ]
    if shares:
        notes.append(
            f"Assumed, as measured on the small model: ratio {shares} of the readable visual tokens. --kept-share sets it."
        )
    return notes
