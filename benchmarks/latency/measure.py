"""Prefill and decoding time, stock and trimmed in turns: ``python -m benchmarks latency``.

All ways of a scenario live in one process and take every decoding step in turns, so that what slows the machine slows all of
them; ratios are taken step by step. "stock again" is stock against itself: its ratio is the noise. Random weights attend nearly
evenly and the paper's rule would keep nearly everything, so a processor keeps a given share (evenly spaced tokens); what is kept
does not matter for time.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from rich.progress import Progress

import trim_plugin.forward.turn
from benchmarks.common.decoding import Decoding, stock_cache
from benchmarks.common.device import kv_bytes, peak, start_peak, synchronize
from benchmarks.common.given_share import EvenlySpaced
from benchmarks.common.intervals import median_interval, spread
from benchmarks.common.models import DTYPE, load_shape
from benchmarks.common.results import environment, write_result
from benchmarks.common.scenarios import SCENARIOS, scenario_inputs
from benchmarks.common.seeds import seed_everything
from benchmarks.latency import compiled, first_token, merging, pieces, reading, tower
from benchmarks.latency.layers import layers_timed
from trim_plugin import TrimmedCache

WAYS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "stock again": None,
    "exact": {"top_k_ratio": 1.0},
    "kept 0.5": {"processors": [EvenlySpaced(0.5)]},
    "kept 0.25": {"processors": [EvenlySpaced(0.25)]},
    "kept 0.1": {"processors": [EvenlySpaced(0.1)]},
}
FEW_WAYS = ("stock", "stock again", "exact", "kept 0.25")


def weight_bytes_of_a_step(model: Any) -> int:
    """Bytes of the weights that a decoding step reads: the text model without embeddings and without the projections of
    visual tokens, and `lm_head`."""
    text = model.model.language_model
    unread = ("embed_tokens", "cross_attn.k_proj", "cross_attn.v_proj", "cross_attn.k_norm")
    read = [tensor for name, tensor in text.named_parameters() if not any(part in name for part in unread)]
    return sum(tensor.nbytes for tensor in [*read, model.lm_head.weight])


@contextlib.contextmanager
def scoring_watched(device: str, found: dict[str, Any]) -> Iterator[None]:
    """Measure what choosing costs within one prefill: seconds, and the scratch of scoring."""
    turn = trim_plugin.forward.turn
    select, score = turn.select, turn.visual_token_scores
    found["seconds"] = 0.0

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            synchronize(device)
            start = time.perf_counter()
            result = work(*args)
            synchronize(device)
            found["seconds"] += time.perf_counter() - start
            return result

        return wrapped

    def weighed(*args: Any) -> torch.Tensor:
        before = start_peak(device)
        scores = score(*args)
        found["scratch_bytes"] = max(0, peak(device) - before - scores.nbytes)
        return scores

    patched = [
        mock.patch.object(turn, "select", timed(select)),
        mock.patch.object(turn, "visual_token_scores", timed(score)),
    ]
    if found.get("weigh"):
        patched = [mock.patch.object(turn, "visual_token_scores", weighed)]
    with contextlib.ExitStack() as stack:
        for patch in patched:
            stack.enter_context(patch)
        yield


def measure(
    model: Any, shape: str, name: str, batch: int, steps: int, prefills: int, ways: tuple[str, ...], device: str
) -> dict[str, Any]:
    """One scenario and batch size: all ways in turns."""
    inputs = scenario_inputs(model, SCENARIOS[name], batch)
    prefill_times: dict[str, list[float]] = {way: [] for way in ways}
    scoring: list[float] = []
    runs: dict[str, Decoding] = {}
    for turn in range(prefills):
        for way in ways if turn % 2 == 0 else tuple(reversed(ways)):
            runs.pop(way, None)
            settings = WAYS[way]
            cache = stock_cache(model) if settings is None else TrimmedCache(model, settings)
            runs[way] = Decoding(model, inputs, cache)
            watched: dict[str, Any] = {}
            with scoring_watched(device, watched):
                prefill_times[way].append(_timed(runs[way].prefill, device))
            if way == "kept 0.25":
                scoring.append(watched["seconds"] / prefill_times[way][-1])
    for way in ways:  # warm-up
        for _ in range(2):
            runs[way].step()
    times: dict[str, list[float]] = {way: [] for way in ways}
    for step in range(steps):
        for way in ways if step % 2 == 0 else tuple(reversed(ways)):
            times[way].append(_timed(runs[way].step, device))
    weights = weight_bytes_of_a_step(model)
    held = {way: kv_bytes(model, run.cache) for way, run in runs.items()}
    rows = []
    for way in ways:
        ratio = spread([own / stock for own, stock in zip(times[way], times["stock"], strict=True)])
        roof = (weights + sum(held[way])) / (weights + sum(held["stock"]))
        rows.append(
            {
                "way": way,
                "cross_kv": held[way][0],
                "self_kv": held[way][1],
                "prefill_seconds": spread(prefill_times[way]),
                "prefill_ratio": spread(
                    [a / b for a, b in zip(prefill_times[way], prefill_times["stock"], strict=True)]
                ),
                "step_seconds": spread(times[way]),
                "step_ratio": ratio,
                "step_ratio_interval": median_interval(
                    [own / stock for own, stock in zip(times[way], times["stock"], strict=True)]
                ),
                "tokens_per_second": batch / spread(times[way])["median"],
                "roofline_ratio": roof,
                "roofline_share": roof / ratio["median"],
            }
        )
    return {
        "shape": shape,
        "scenario": name,
        "batch": batch,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "steps": steps,
        "weights_read": weights,
        "scoring_share_of_prefill": spread(scoring),
        "rows": rows,
    }


def scoring_cost(model: Any, shape: str, device: str, repeats: int) -> dict[str, Any]:
    """Scoring's time beside the prefill of a whole 11B text model, and its scratch, for one page and one prompt."""
    inputs = scenario_inputs(model, SCENARIOS["page"], 1)
    seconds, layers = [], {}
    for _ in range(repeats):
        watched: dict[str, Any] = {}
        with scoring_watched(device, watched):
            Decoding(model, inputs, TrimmedCache(model, WAYS["kept 0.25"])).prefill()
        seconds.append(watched["seconds"])
        with layers_timed(model, device, layers):
            Decoding(model, inputs, stock_cache(model)).prefill()
    watched = {"weigh": True}
    with scoring_watched(device, watched):
        Decoding(model, inputs, TrimmedCache(model, WAYS["kept 0.25"])).prefill()
    per_layer = {kind: spread(times)["median"] for kind, times in layers.items()}
    result = {
        "shape": shape,
        "seconds": spread(seconds),
        "layer_seconds": per_layer,
        "scratch_bytes": watched["scratch_bytes"],
    }
    if shape != "small":  # 40 layers as in the 11B model; its vision tower would make the share smaller still
        whole = 32 * per_layer["self"] + 8 * per_layer["cross"]
        result["share_of_40_layers"] = spread(seconds)["median"] / whole
    return result


def _timed(work: Any, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def combinations(arguments: argparse.Namespace) -> list[tuple[str, str, int, int, int, tuple[str, ...]]]:
    """(shape, scenario, batch, decoding steps, prefills, ways)."""
    every = tuple(WAYS)
    found: list[tuple[str, str, int, int, int, tuple[str, ...]]] = []
    for shape in arguments.shapes:
        if shape == "small":
            batches = arguments.batches or ([1, 8] if arguments.quick else [1, 8, 32])
            names = ("photo", "page") if arguments.quick else tuple(SCENARIOS)
            steps, prefills = (30, 3) if arguments.quick else (101, 5)
            found += [
                (shape, name, batch, steps, prefills if batch * SCENARIOS[name].images <= 8 else 3, every)
                for name in names
                for batch in batches
                if batch * SCENARIOS[name].images <= 64
            ]
        elif arguments.quick:
            found.append((shape, "page", 1, 8, 1, FEW_WAYS))
        elif arguments.batches:
            found += [(shape, name, batch, 30, 3, every) for name in SCENARIOS for batch in arguments.batches]
        else:
            found += [
                (shape, "page", 1, 20, 1, every),
                (shape, "photo", 1, 20, 1, every),
                (shape, "page", 4, 12, 1, FEW_WAYS),
                (shape, "chat", 1, 12, 1, FEW_WAYS),
                (shape, "photo", 8, 12, 1, FEW_WAYS),
                (shape, "pages", 1, 12, 1, FEW_WAYS),
                (shape, "page", 16, 12, 1, FEW_WAYS),
                (shape, "photo", 32, 12, 1, FEW_WAYS),
                (shape, "video", 1, 12, 1, FEW_WAYS),
            ]
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, write and return the result."""
    if arguments.compiled:
        return compiled.run(arguments)
    if arguments.first_token:
        return first_token.run(arguments)
    if arguments.merging:
        return merging.run(arguments)
    if arguments.pieces:
        return pieces.run(arguments)
    if arguments.reading:
        return reading.run(arguments)
    if arguments.tower:
        return tower.run(arguments)
    seed_everything()
    rows, scoring, skipped, models = [], [], [], {}
    with Progress() as bar:
        wanted = combinations(arguments)
        task = bar.add_task("latency", total=len(wanted))
        for shape, name, batch, steps, prefills, ways in wanted:
            bar.update(task, description=f"latency: {shape}, {name}, batch {batch}")
            if shape not in models:
                models.clear()
                models[shape] = load_shape(shape, getattr(torch, DTYPE[shape]), arguments.device)
                scoring.append(scoring_cost(models[shape], shape, arguments.device, 1 if arguments.quick else 3))
            try:
                rows.append(measure(models[shape], shape, name, batch, steps, prefills, ways, arguments.device))
            except torch.OutOfMemoryError:
                skipped.append({"shape": shape, "scenario": name, "batch": batch, "reason": "out of memory"})
            bar.advance(task)
            result = {
                "environment": environment(arguments.device),
                "quick": arguments.quick,
                "dtype": DTYPE,
                "rows": rows,
                "scoring": scoring,
                "skipped": skipped,
            }
            write_result("latency", result, arguments.out)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument(
        "--compiled", action="store_true", help="latency: compiled decoding instead, with a static cache"
    )
    parser.add_argument(
        "--first-token", action="store_true", help="latency: time to the first token about an encoded page instead"
    )
    parser.add_argument("--merging", action="store_true", help="latency: what merging costs instead")
    tower.add_arguments(parser)
    reading.add_arguments(parser)
