"""Finds the largest batch that fits into a memory, and says what limits it."""

from __future__ import annotations

import bisect
import dataclasses
import math

from trim_plugin.arithmetic import format_bytes
from trim_plugin.planning.configuration import Configuration
from trim_plugin.planning.job import Job
from trim_plugin.planning.model_sizes import weight_bytes
from trim_plugin.planning.planner import RESERVE, Plan, PlannedVariant, plan

#: Nobody generates for more samples at once; also where a search stops that no memory stops.
MOST = 2**20
#: Formats of weights in which they take less room, from the better to the smaller.
FEWER_BITS = ("int8", "nf4")


@dataclasses.dataclass(frozen=True)
class Fit:
    """What fits into a memory.

    Args:
        largest_batch: samples of one `generate`; 0 if not even one fits.
        limit: what one sample more would take too much of: "weights", "prefill" (its working set), "cross KV", "self KV" or
            "decoding step".
        reason: the same in words, for a person.
    """

    largest_batch: int
    limit: str
    reason: str


def largest_fit(
    config: Configuration,
    job: Job,
    variant: PlannedVariant,
    memory: int,
    *,
    weights: str = "bf16",
    reserve: int = RESERVE,
) -> Fit:
    """The largest batch whose peak, with the reserve, stays within `memory` bytes. The job's own batch does not matter.

    Example:
        >>> from trim_plugin.planning.configuration import built_in_config
        >>> from trim_plugin.planning.planner import variants
        >>> config, small = built_in_config("11b"), 24 * 2**30
        >>> stock, _, trimmed = (largest_fit(config, Job(), variant, small, weights="nf4") for variant in variants())
        >>> stock.limit, trimmed.limit, trimmed.largest_batch > 4 * stock.largest_batch
        ('prefill', 'cross KV', True)
    """

    def planned(batch: int) -> Plan:
        return plan(config, dataclasses.replace(job, batch=batch), variant, weights=weights, reserve=reserve)

    largest = bisect.bisect_right(range(1, MOST), memory, key=lambda batch: planned(batch).needed)
    over = planned(largest + 1)
    if over.weights_total + reserve >= memory:
        return Fit(largest, "weights", _weights_too_large(config, weights, reserve, memory))
    return Fit(largest, *_limit(over, memory))


def _weights_too_large(config: Configuration, weights: str, reserve: int, memory: int) -> str:
    """A sentence: the weights alone do not fit; in which format, or on how many devices, they would."""
    free = memory - reserve
    if free <= 0:
        return f"the reserve alone takes {format_bytes(reserve)}"
    sizes = {name: sum(weight_bytes(config, name).values()) for name in (weights, *FEWER_BITS)}
    too_large = (
        f"the weights alone take {format_bytes(sizes[weights])} in {weights}, and with a reserve of {format_bytes(reserve)} "
        f"that is more than {format_bytes(memory)}"
    )
    smaller = [name for name in FEWER_BITS if sizes[name] < sizes[weights]]
    fitting = [f"{name} ({format_bytes(sizes[name])})" for name in smaller if sizes[name] < free]
    devices = {name: math.ceil(sizes[name] / free) for name in (weights, *smaller[-1:])}
    spread = " or ".join(f"{count} in {name}" for name, count in devices.items() if count > 1)
    instead = f"in {' or '.join(fitting)}, or spread" if fitting else "in no format, only spread"
    return f"{too_large}. They fit {instead} over devices of this size: at least {spread}"


def _limit(over: Plan, memory: int) -> tuple[str, str]:
    """What the first batch that does not fit has too much of, as a word and as a sentence."""
    free = memory - over.weights_total - over.reserve
    if over.prefill_peak >= over.decode_peak:
        when, cross = "reading the prompts", over.prefill_kv * over.cross_kv // (over.cross_kv + over.prompt_kv)
        parts = {"cross KV": cross, "self KV": over.prefill_kv - cross, "prefill": over.prefill_set}
    else:
        when = "decoding"
        parts = {"cross KV": over.cross_kv, "self KV": over.self_kv, "decoding step": over.decode_set}
    words = ", ".join(f"{name} {format_bytes(count)}" for name, count in parts.items() if count)
    return max(parts, key=lambda name: parts[name]), f"{when} needs {words}, and {format_bytes(free)} are left"
