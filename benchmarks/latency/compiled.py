"""Compiled decoding: ``python -m benchmarks latency --compiled``.

Whole generations with `generate`, four ways in turns in one process: stock and trimmed, eager and compiled. Time per token is
the time between two tokens; the first generation of each compiled way, which compiles, is timed apart. On a CPU compilation is
switched on with `CompileConfig._compile_all_devices`.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from typing import Any

import torch
from rich.progress import Progress
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList

from benchmarks.common.device import synchronize
from benchmarks.common.given_share import EvenlySpaced
from benchmarks.common.intervals import spread
from benchmarks.common.models import load_shape
from benchmarks.common.results import environment, write_result
from benchmarks.common.scenarios import SCENARIOS, scenario_inputs
from benchmarks.common.seeds import seed_everything
from trim_plugin import TrimmedCache
from trim_plugin.cache.report import TrimReport
from trim_plugin.config import DEFAULT_STATIC_BUCKET

#: Kept share of the trimmed ways. On random weights the paper's rule keeps nearly everything, so a processor keeps a given share.
KEPT = 0.25
WAYS = ("stock eager", "stock static compiled", "trimmed eager", "trimmed compiled")


class StepClock(LogitsProcessor):
    """Notes when each token's logits were ready."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        synchronize(self.device)
        self.times.append(time.perf_counter())
        return scores

    def steps(self) -> list[float]:
        """Seconds per decoded token, the prefill's and the first compiled step left out."""
        return [later - earlier for earlier, later in zip(self.times[1:], self.times[2:], strict=False)]


def bucket_of(shape: str) -> int:
    """`static_bucket`: the default, or as much smaller as the small model's pictures are (260 tokens instead of 6,404)."""
    return 16 if shape == "small" else DEFAULT_STATIC_BUCKET


def settings_of(way: str, prompt: int, new_tokens: int, bucket: int) -> dict[str, Any]:
    """Arguments of `generate` for one way."""
    settings: dict[str, Any] = {"disable_compile": "compiled" not in way}
    if "compiled" in way:
        compile_config = CompileConfig(
            fullgraph=True, mode=None if not torch.cuda.is_available() else "reduce-overhead"
        )
        compile_config._compile_all_devices = True
        settings["compile_config"] = compile_config
    if way == "stock static compiled":
        settings["cache_implementation"] = "static"
    if way.startswith("trimmed"):
        config: dict[str, Any] = {"processors": [EvenlySpaced(KEPT)]}
        if "compiled" in way:
            config |= {"static": True, "static_bucket": bucket, "max_cache_len": prompt + new_tokens}
        settings |= {"cache_implementation": "trimmed", "cache_config": config}
    return settings


def measure(
    model: Any, name: str, batch: int, rounds: int, new_tokens: int, bucket: int, device: str, bar: Progress
) -> dict[str, Any]:
    """All ways in turns on one scenario."""
    inputs = scenario_inputs(model, SCENARIOS[name], batch)
    prompt = inputs["input_ids"].shape[1]
    task = bar.add_task(f"compiled: {name}, batch {batch}", total=(rounds + 1) * len(WAYS))
    first, steps, tokens = {}, {way: [] for way in WAYS}, {}  # type: ignore[var-annotated]
    for turn in range(rounds + 1):
        for way in WAYS if turn % 2 == 0 else tuple(reversed(WAYS)):
            clock = StepClock(device)
            start = time.perf_counter()
            sequences = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=new_tokens,
                logits_processor=LogitsProcessorList([clock]),
                **settings_of(way, prompt, new_tokens, bucket),
            )
            if turn == 0:
                first[way] = time.perf_counter() - start
            else:
                steps[way].append(spread(clock.steps())["median"])
            tokens[way] = sequences[:, prompt:]
            bar.advance(task)
    rows = [
        {
            "way": way,
            "first_generation_seconds": first[way],
            "step_seconds": spread(steps[way]),
            "times_stock_eager": spread([a / b for a, b in zip(steps["stock eager"], steps[way], strict=True)]),
        }
        for way in WAYS
    ]
    same = {
        "stock": float((tokens["stock eager"] == tokens["stock static compiled"]).float().mean()),
        "trimmed": float((tokens["trimmed eager"] == tokens["trimmed compiled"]).float().mean()),
    }
    return {
        "scenario": name,
        "batch": batch,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "rows": rows,
        "same_tokens": same,
    }


@torch.no_grad()
def held(model: Any, name: str, bucket: int) -> dict[str, Any]:
    """Bytes that a dynamic and static trimmed caches hold after a prompt and room for 64 tokens."""
    inputs = scenario_inputs(model, SCENARIOS[name], 1)
    found = {}
    length = inputs["input_ids"].shape[1] + 64
    static = {"static": True, "static_bucket": bucket, "max_cache_len": length}
    ways = {"dynamic": {}, "static": static}
    if importlib.util.find_spec("bitsandbytes") is not None:
        ways["static, int8"] = static | {"kv_quantization": "int8"}
    for title, extra in ways.items():
        cache = TrimmedCache(model, {"processors": [EvenlySpaced(KEPT)], **extra})
        model(**inputs, cache=cache, use_cache=True)
        report: TrimReport = cache.report()
        found[title] = {"cross_kv": report.cross_kv_bytes, "self_kv": report.self_kv_bytes}
        found["kept_tokens"] = report.kept_tokens[0]
        found["stock_cross_kv"] = report.stock_cross_kv_bytes
    return {"scenario": name, **found}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, write and return the result."""
    seed_everything()
    shape = arguments.shapes[0]
    dtype = torch.float32 if shape == "small" else torch.bfloat16
    model = load_shape(shape, dtype, arguments.device)
    rounds, new_tokens, bucket = *((2, 32) if arguments.quick else (21, 64)), bucket_of(shape)
    batches = arguments.batches or ([1] if arguments.quick else [1, 8])
    cases = [("page", batch) for batch in batches] + ([] if arguments.quick else [("pages", 1), ("video", 1)])
    with Progress() as bar:
        rows = [measure(model, *case, rounds, new_tokens, bucket, arguments.device, bar) for case in cases]
    result = {
        "environment": environment(arguments.device),
        "quick": arguments.quick,
        "shape": shape,
        "kept": KEPT,
        "bucket": bucket,
        "rows": rows,
        "memory": [held(model, name, bucket) for name in SCENARIOS],
    }
    write_result("compiled", result, arguments.out)
    return result
