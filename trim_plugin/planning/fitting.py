"""What fits into a memory, what limits it, and what would have to change."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from transformers import MllamaConfig

from trim_plugin.cache.report import format_bytes
from trim_plugin.planning.job import Job
from trim_plugin.planning.planner import RESERVE, Plan, Way, plan

#: Nobody generates for more samples at once; also where a search stops that no memory stops.
MOST = 2**20
#: What a change costs, in no unit: only the order counts, see `cheapest_change`.
KV_COSTS = {None: 0, "int8": 2, "nf4": 4}
SHARE_COSTS = {0.5: 6, 0.25: 8, 0.1: 14, 0.05: 24}
WEIGHT_COSTS = {"fp32": 0, "bf16": 20, "fp16": 20, "int8": 30, "nf4": 34, "fp4": 36}


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
    config: MllamaConfig, job: Job, way: Way, memory: int, *, weights: str = "bf16", reserve: int = RESERVE
) -> Fit:
    """The largest batch whose peak, with the reserve, stays within `memory` bytes.

    Args:
        config: the model's configuration.
        job: what is generated; its batch does not matter.
        way: how.
        memory: bytes of the device.
        weights: format of the weights.
        reserve: bytes to be left free.

    Example:
        >>> from trim_plugin.planning.model_sizes import built_in_config
        >>> from trim_plugin.planning.planner import ways
        >>> config, small = built_in_config("11b"), 24 * 2**30
        >>> stock, _, trimmed = (largest_fit(config, Job(), way, small, weights="nf4") for way in ways())
        >>> stock.limit, trimmed.limit, trimmed.largest_batch > 4 * stock.largest_batch
        ('prefill', 'cross KV', True)
    """

    def planned(batch: int) -> Plan:
        return plan(config, dataclasses.replace(job, batch=batch), way, weights=weights, reserve=reserve)

    def fits(batch: int) -> bool:
        return planned(batch).needed <= memory

    low, high = 0, 1
    while high < MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Fit(low, *_limit(planned(low + 1), memory))


def _limit(over: Plan, memory: int) -> tuple[str, str]:
    """What the first batch that does not fit has too much of, as a word and as a sentence."""
    free = memory - over.weights_total - over.reserve
    if free <= 0:
        return (
            "weights",
            f"the weights take {format_bytes(over.weights_total)} and the reserve {format_bytes(over.reserve)}",
        )
    if over.prefill_peak >= over.decode_peak:
        when, cross = "reading the prompts", over.prefill_kv * over.cross_kv // (over.cross_kv + over.prompt_kv)
        parts = {"cross KV": cross, "self KV": over.prefill_kv - cross, "prefill": over.prefill_set}
    else:
        when = "decoding"
        parts = {"cross KV": over.cross_kv, "self KV": over.self_kv, "decoding step": over.decode_set}
    words = ", ".join(f"{name} {format_bytes(count)}" for name, count in parts.items() if count)
    return max(parts, key=lambda name: parts[name]), f"{when} needs {words}, and {format_bytes(free)} are left"


@dataclasses.dataclass(frozen=True)
class Change:
    """A changed way, and the changed weights, in which a job fits.

    Args:
        way: how to generate.
        weights: format of the weights.
        words: what to change, as options of the command line or fields of `TrimConfig`; empty if nothing.
        needed: bytes then, with the reserve.
    """

    way: Way
    weights: str
    words: tuple[str, ...]
    needed: int


def cheapest_change(
    config: MllamaConfig, job: Job, way: Way, memory: int, *, weights: str = "bf16", reserve: int = RESERVE
) -> Change | None:
    """The cheapest change that makes a job fit; None if nothing does but a smaller batch.

    Cheapest in what it costs: smaller pieces cost a little time, 8 bits for the cache next to nothing; then come 4 bits, a
    smaller kept share, and last of all weights in 8 or 4 bits. Changes of several kinds cost the sum.

    Example:
        >>> from trim_plugin.planning.model_sizes import built_in_config
        >>> found = cheapest_change(built_in_config("11b"), Job(batch=100), Way("trimmed", 0.25), 28 * 2**30)
        >>> found.words
        ('--kv-quantization int8',)
    """
    for changed, format, words in _changes(way, weights):
        needed = plan(config, job, changed, weights=format, reserve=reserve).needed
        if needed <= memory:
            return Change(changed, format, words, needed)
    return None


def _changes(way: Way, weights: str) -> Iterator[tuple[Way, str, tuple[str, ...]]]:
    """Every way that is at most as demanding: way, weights and what was changed, the cheapest first."""
    start = dataclasses.replace(way, name="exact", kept_share=1.0) if way.stock else way
    first = ("cache_implementation='trimmed'",) if way.stock else ()
    now = start.kept_share or 1.0
    pieces = [(0, start.prefill_pictures, "")]
    if start.prefill_pictures != 1:
        pieces.append((1, 1, "prefill_pictures=1"))
    formats = [(0, start.kv_quantization, "")]
    formats += [
        (cost, name, f"--kv-quantization {name}")
        for name, cost in KV_COSTS.items()
        if cost > KV_COSTS[start.kv_quantization]
    ]
    shares = [(0, now, "")]
    shares += [(cost, share, f"--kept-share {share:g}") for share, cost in SHARE_COSTS.items() if share < now]
    kinds = [(0, weights, "")]
    kinds += [
        (cost, name, f"--weights {name}")
        for name, cost in WEIGHT_COSTS.items()
        if cost > WEIGHT_COSTS[weights] and name not in ("fp16", "fp4")
    ]
    combined = sorted(itertools.product(pieces, formats, shares, kinds), key=lambda some: sum(one[0] for one in some))
    for some in combined:
        (_, pictures, _), (_, format, _), (_, share, _), (_, kind, _) = some
        changed = dataclasses.replace(start, prefill_pictures=pictures, kv_quantization=format, kept_share=share)
        yield changed, kind, first + tuple(word for *_, word in some if word)
