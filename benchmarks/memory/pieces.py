"""A prompt read in pieces: its peak against the batch, and what fits. ``python -m benchmarks memory --pieces``.

The model has a real vision tower, since that is what a prefill without pieces holds for every picture at once. A rising curve
(stock) stands beside a flat one. Then a process is given a limit, and the largest batch that it gets through is found by trying.
Which tokens are kept does not matter for memory, so a processor keeps a given share.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import multiprocessing
import os
import resource
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.common.device import peak, start_peak, synchronize
from benchmarks.common.given_share import EvenlySpaced
from benchmarks.common.models import DTYPE, load_shape
from benchmarks.common.results import environment, read_result, write_result
from benchmarks.common.scenarios import SCENARIOS, scenario_inputs
from benchmarks.common.seeds import seed_everything
from trim_plugin.arithmetic import picture_tokens
from trim_plugin.planning import planner
from trim_plugin.planning.job import Job

NEW_TOKENS = 4
KEPT = 0.1
#: Seconds after which a case is given up: libraries may hang where a limit leaves them nothing.
PATIENCE = 3600
#: Way → `TrimConfig` fields, None for stock.
WAYS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "in pieces": {"processors": [EvenlySpaced(KEPT)]},
    "one at a time": {"processors": [EvenlySpaced(KEPT)], "prefill_pictures": 1},
    "trimmed, in one piece": {"processors": [EvenlySpaced(KEPT)], "prefill_pictures": 10**6},
}
BATCHES = {
    "stock": (1, 2, 4, 8, 16),
    "in pieces": (1, 2, 4, 8, 16, 32),
    "one at a time": (1, 8, 32),
    "trimmed, in one piece": (1, 8),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One `generate` call in a process of its own.

    Args:
        way: a key of `WAYS`.
        batch: samples with a picture of four tiles each.
        limit: bytes beyond what the process holds before the call; None for no limit.
    """

    way: str
    batch: int
    limit: int | None = None


def measure(model: Any, case: Case, device: str) -> dict[str, Any]:
    """Generate, and say what the process or the GPU allocator held at most; or that it did not fit the limit."""
    torch.set_num_threads(max(1, min(2, len(os.sched_getaffinity(0)))))
    seed_everything()
    inputs = scenario_inputs(model, SCENARIOS["page"], case.batch)
    _generate(
        model, {name: tensor[:1] for name, tensor in inputs.items() if name in ("input_ids", "attention_mask")}, None
    )
    before = start_peak(device)
    if case.limit is not None:
        _limit(case.limit, device)
    try:
        output = _generate(model, inputs, WAYS[case.way])
    except (RuntimeError, MemoryError) as error:  # torch's CPU allocator raises a plain RuntimeError
        if case.limit is None or not _out_of_memory(error):
            raise
        return dataclasses.asdict(case) | {"fits": False}
    synchronize(device)
    held = output.cache
    return dataclasses.asdict(case) | {
        "fits": True,
        "before": before,
        "peak": peak(device),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "kept_tokens": max(held.report().kept_tokens) if WAYS[case.way] is not None else None,
    }


def _generate(model: Any, inputs: dict[str, torch.Tensor], settings: dict[str, Any] | None) -> Any:
    how = {} if settings is None else {"cache_implementation": "trimmed", "cache_config": settings}
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **how)


def _limit(size: int, device: str) -> None:
    """Let nothing more than `size` bytes be allocated from here on."""
    if device.startswith("cuda"):
        total = torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + size) / total))
        return
    with open("/proc/self/status", encoding="ascii") as status:
        now = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + size, now + size))


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def largest_fit(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch up to `most` for which `fits` holds, 0 if none: doubled until it fails, then halved.

    Example:
        >>> largest_fit(lambda batch: batch <= 11, most=64), largest_fit(lambda batch: True, most=64)
        (11, 64)
    """
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def with_plan(row: dict[str, Any], model: Any) -> dict[str, Any]:
    """Add what the planner says about the same case."""
    config = model.config
    job = Job(batch=row["batch"], prompt_tokens=row["prompt_tokens"], new_tokens=NEW_TOKENS)
    share = None if row["kept_tokens"] is None else row["kept_tokens"] / picture_tokens(config.vision_config)
    pictures = (WAYS[row["way"]] or {}).get("prefill_pictures")
    variant = planner.PlannedVariant(row["way"], share, prefill_pictures=pictures)
    planned = planner.plan(config, job, variant, weights="fp32" if model.dtype == torch.float32 else "bf16")
    return row | {"planned": planned.peak - planned.weights_total}


def _child(model: Any, case: Case, device: str, pipe: Any) -> None:
    try:
        pipe.send(measure(model, case, device))
    except Exception as error:  # noqa: BLE001 - whatever fails in a case is reported as that case's result
        pipe.send(dataclasses.asdict(case) | {"error": f"{type(error).__name__}: {error}".splitlines()[0]})


def _run_case(model: Any, device: str, case: Case) -> dict[str, Any]:
    """A case in a forked process; CUDA cannot be forked, and its allocator's own peak needs no process a case."""
    if device.startswith("cuda"):
        try:
            return measure(model, case, device)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(model, case, device, send))
    process.start()
    send.close()
    try:
        if not receive.poll(PATIENCE):
            process.kill()
        row = receive.recv()
    except EOFError:
        row = dataclasses.asdict(case) | {"error": "the process was ended from outside"}
    process.join()
    return row


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, write and return the result."""
    # In a new process: one whose thread pool has started cannot be forked.
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(arguments,))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the process that measures ended with status {process.exitcode}")
    return read_result("pieces", arguments.out) or {}


def _run(arguments: argparse.Namespace) -> None:
    shape = "11b" if "11b" in arguments.shapes else "11b-tower"
    torch.set_num_threads(1)  # no thread pool, which would not survive the forks
    model = load_shape(shape, getattr(torch, DTYPE[shape]), arguments.device)
    run_case = functools.partial(_run_case, model, arguments.device)
    batches = {way: arguments.batches or (own[:2] if arguments.quick else own) for way, own in BATCHES.items()}
    ways = ("stock", "in pieces") if arguments.quick else tuple(WAYS)
    rows: list[dict[str, Any]] = []
    fits: list[dict[str, Any]] = []
    result = {
        "environment": environment(arguments.device),
        "quick": arguments.quick,
        "shape": shape,
        "vision_layers": [model.config.vision_config.num_hidden_layers, model.config.vision_config.num_global_layers],
        "weights": sum(tensor.nbytes for tensor in model.parameters()),
        "kept": KEPT,
        "rows": rows,
        "limit": arguments.limit_gib * 2**30,
        "most": arguments.most,
        "fits": fits,
    }
    with Progress() as bar:
        task = bar.add_task("pieces", total=sum(len(batches[way]) for way in ways))
        for case in [Case(way, batch) for way in ways for batch in batches[way]]:
            bar.update(task, description=f"pieces: {case.way}, batch {case.batch}")
            row = run_case(case)
            rows.append(row if "error" in row else with_plan(row, model))
            bar.advance(task)
            write_result("pieces", result, arguments.out)  # a run that is cut off leaves what it has
        for way in ("stock", "in pieces") if arguments.limit_gib and not arguments.quick else ():
            tried: dict[int, bool] = {}

            def fits_in(batch: int, way: str = way, tried: dict[int, bool] = tried) -> bool:
                bar.update(task, description=f"what fits: {way}, batch {batch}")
                tried[batch] = bool(run_case(Case(way, batch, int(result["limit"]))).get("fits"))
                return tried[batch]

            largest = largest_fit(fits_in, arguments.most)
            fits.append({"way": way, "largest": largest, "tried": sorted(tried.items())})
            write_result("pieces", result, arguments.out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--pieces", action="store_true", help="memory, latency: what reading in pieces saves and costs")
    parser.add_argument(
        "--limit-gib", type=float, default=3.0, help="memory --pieces: limit beyond the weights; 0 for none"
    )
    parser.add_argument("--most", type=int, default=64, help="memory --pieces: largest batch that is tried")
