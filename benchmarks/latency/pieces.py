"""What reading a prompt in pieces costs in time: ``python -m benchmarks latency --pieces``.

The same trimmed cache reads the same batch whole and in pieces, in turns, so that what slows the machine slows both; ratios are
taken turn by turn. "whole again" is the whole against itself: its ratio is the noise.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.common.device import synchronize
from benchmarks.common.given_share import EvenlySpaced
from benchmarks.common.intervals import median_interval, spread
from benchmarks.common.models import DTYPE, load_shape
from benchmarks.common.results import environment, write_result
from benchmarks.common.scenarios import SCENARIOS, scenario_inputs
from benchmarks.common.seeds import seed_everything
from trim_plugin import TrimmedCache, prefill
from trim_plugin.generation.micro_batches import cut

EVERYTHING = 10**6
WAYS: dict[str, dict[str, Any]] = {
    "whole": {"prefill_pictures": EVERYTHING},
    "whole again": {"prefill_pictures": EVERYTHING},
    "in pieces": {},
    "one picture at a time": {"prefill_pictures": 1},
}
#: (shape, batches, turns)
CASES: tuple[tuple[str, tuple[int, ...], int], ...] = (
    ("small", (1, 8, 32, 64), 15),
    ("11b-tower", (4, 8), 3),
)
QUICK: tuple[tuple[str, tuple[int, ...], int], ...] = (("small", (1, 8), 7),)
KEPT = 0.1


def measure(model: Any, shape: str, batch: int, turns: int, device: str) -> dict[str, Any]:
    """One batch of pages: all ways in turns."""
    seed_everything()
    inputs = scenario_inputs(model, SCENARIOS["page"], batch)
    ways = [way for way in WAYS if way != "one picture at a time" or shape == "small"]
    times: dict[str, list[float]] = {way: [] for way in ways}
    pieces = {}
    for turn in range(turns + 1):
        for way in ways if turn % 2 == 0 else list(reversed(ways)):
            cache = TrimmedCache(model, {"processors": [EvenlySpaced(KEPT)], **WAYS[way]})
            pieces[way] = len(cut(cache, inputs, batch, model.config.vision_config).slices)
            synchronize(device)
            start = time.perf_counter()
            prefill(model, cache, **inputs)
            synchronize(device)
            if turn > 0:  # the first is the warm-up
                times[way].append(time.perf_counter() - start)
    rows = []
    for way in ways:
        ratios = [own / whole for own, whole in zip(times[way], times["whole"], strict=True)]
        rows.append(
            {
                "way": way,
                "pieces": pieces[way],
                "seconds": spread(times[way]),
                "ratio": spread(ratios),
                "ratio_interval": median_interval(ratios),
            }
        )
    return {"shape": shape, "batch": batch, "turns": turns, "rows": rows}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, write and return the result."""
    cases = QUICK if arguments.quick else CASES
    rows: list[dict[str, Any]] = []
    result = {
        "environment": environment(arguments.device),
        "quick": arguments.quick,
        "dtype": DTYPE,
        "kept": KEPT,
        "rows": rows,
    }
    with Progress() as bar:
        task = bar.add_task("pieces", total=sum(len(batches) for _, batches, _ in cases))
        for shape, batches, turns in cases:
            model = load_shape(shape, getattr(torch, DTYPE[shape]), arguments.device)
            for batch in arguments.batches or batches:
                bar.update(task, description=f"pieces: {shape}, batch {batch}")
                rows.append(measure(model, shape, batch, turns, arguments.device))
                bar.advance(task)
                write_result("pieces_latency", result, arguments.out)
    return result
