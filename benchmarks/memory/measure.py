"""What is held in memory and what a process needs at its peak: ``python -m benchmarks memory``.

Every case generates a few tokens in a process of its own. On the CPU a loader process makes a model once and forks, so that a
case starts with the weights in place; its peak is the resident set's high-water mark, reset before generation starts.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.common.device import kv_bytes, peak, start_peak, synchronize
from benchmarks.common.given_share import EvenlySpaced
from benchmarks.common.models import DTYPE, finish, load_shape, random_model, shape_config
from benchmarks.common.results import environment, write_result
from benchmarks.common.scenarios import SCENARIOS, scenario_inputs
from benchmarks.common.seeds import seed_everything
from benchmarks.memory import combined, pieces
from trim_plugin import TrimConfig
from trim_plugin.arithmetic import tile_tokens
from trim_plugin.embedded import SMALL_MODEL
from trim_plugin.kv_formats import KV_FORMATS
from trim_plugin.planning import planner
from trim_plugin.planning.job import Job

NEW_TOKENS = 8
#: Formats of weights, in the planner's words.
PLANNED_WEIGHTS = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8", "nf4": "nf4"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One combination. `cache` is a key of `caches()`."""

    shape: str
    scenario: str
    batch: int
    weights: str
    lora: bool
    cache: str

    @property
    def model_key(self) -> tuple[str, str, bool]:
        return self.shape, self.weights, self.lora


def caches(shape: str) -> dict[str, dict[str, Any] | None]:
    """Cache name → `TrimConfig` fields, None for stock's.

    Random weights attend nearly evenly, so that the paper's rule would keep nearly everything: there a processor keeps a given
    share.
    """
    fields = {field.name for field in dataclasses.fields(TrimConfig)}

    def trimmed(ratio: float) -> dict[str, Any]:
        return {"top_k_ratio": ratio} if shape == "small" else {"processors": [EvenlySpaced(ratio)]}

    word = "ratio" if shape == "small" else "kept"
    found: dict[str, dict[str, Any] | None] = {
        "stock dynamic": None,
        "stock static": None,
        "exact": {"top_k_ratio": 1.0},
    }
    found |= {f"{word} {ratio:g}": trimmed(ratio) for ratio in (0.5, 0.25, 0.1)}
    if "kv_quantization" in fields:
        found["exact, int8 KV"] = {"top_k_ratio": 1.0, "kv_quantization": "int8"}
        found[f"{word} 0.25, int8 KV"] = trimmed(0.25) | {"kv_quantization": "int8"}
        found[f"{word} 0.25, nf4 KV"] = trimmed(0.25) | {"kv_quantization": "nf4"}
    return found


def cases(arguments: argparse.Namespace) -> list[Case]:
    """What is measured."""
    found: list[Case] = []
    for shape in arguments.shapes:
        dtype = DTYPE[shape]
        every, batches = list(caches(shape)), [1, 8] if shape == "small" else [1]
        plain = ["stock dynamic", "stock static", "exact", every[4]]
        if arguments.quick:
            chosen = ["photo", "page"] if shape == "small" else ["photo"]
            found += [Case(shape, name, 1, dtype, False, cache) for name in chosen for cache in plain]
            continue
        for name, batch in itertools.product(SCENARIOS, batches):
            wanted = every if name == "page" or shape == "small" else plain
            found += [
                Case(shape, name, batch, dtype, False, cache) for cache in wanted if not (name == "video" and batch > 1)
            ]
        if shape != "small":
            found += [Case(shape, "page", batch, dtype, False, cache) for batch in arguments.batches for cache in plain]
        combined = ["stock dynamic", "exact", *every[4:5], *every[-1:]]
        for weights, lora in itertools.product(("bfloat16", "int8", "nf4"), (False, True)):
            found += [Case(shape, "page", 1, weights, lora, cache) for cache in combined]
    return list(dict.fromkeys(found))


def build(shape: str, weights: str, lora: bool, device: str, folder: Path) -> Any:
    """A model in that format; quantized ones are loaded from `folder`, where the 16-bit weights are saved first."""
    if weights in ("float32", "bfloat16"):
        model = load_shape(shape, getattr(torch, weights), device)
    else:
        from transformers import MllamaForConditionalGeneration

        from trim_plugin.integrations.bitsandbytes import quantization_config, use_standard_layout

        source = SMALL_MODEL if shape == "small" else folder / shape
        if not source.exists():
            _save_random(shape, source)
        model = MllamaForConditionalGeneration.from_pretrained(
            source, dtype=torch.bfloat16, quantization_config=quantization_config(weights), device_map={"": device}
        ).eval()
        use_standard_layout(model, only_misfits=True)
        model = finish(model, shape)
    if lora:
        from peft import get_peft_model

        from trim_plugin.integrations.peft import lora_config

        model = get_peft_model(model, lora_config("text_attention")).base_model.model.eval()
    return model


def _save_random(shape: str, folder: Path) -> None:
    from transformers import MllamaForConditionalGeneration

    model = random_model(shape, torch.bfloat16)
    if shape == "11b-layers":  # the stand-in has no weights to be loaded again
        tower = MllamaForConditionalGeneration._from_config(
            shape_config(shape), dtype=torch.bfloat16
        ).model.vision_model
        model.model.vision_model = tower
    model.save_pretrained(folder)


def measure(model: Any, case: Case, device: str) -> dict[str, Any]:
    """Generate and count.

    Weights are counted as loaded: bitsandbytes repacks 4-bit weights at the first call on CPUs that have AVX512-BF16.
    """
    parts = weights_by_part(model)
    torch.set_num_threads(max(1, min(2, len(os.sched_getaffinity(0)))))
    seed_everything()
    inputs = scenario_inputs(model, SCENARIOS[case.scenario], case.batch)
    settings = caches(case.shape)[case.cache]
    if settings is not None:
        how: dict[str, Any] = {"cache_implementation": "trimmed", "cache_config": settings}
    elif case.cache == "stock static":
        how = {"cache_implementation": "static", "disable_compile": True}
    else:
        how = {}
    _warm_up(model, inputs)
    before = start_peak(device)
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **how)
    synchronize(device)
    highest = peak(device)
    cache = output.cache
    if settings is not None:
        report = cache.report()
        cross, own = report.cross_kv_bytes, report.self_kv_bytes
        kept: Any = report.kept_tokens
    else:
        cross, own, kept = *kv_bytes(model, cache), None
    return dataclasses.asdict(case) | {
        "prompt_tokens": inputs["input_ids"].shape[1],
        "weights_by_part": parts,
        "weights_after": sum(weights_by_part(model).values()),
        "adapters": sum(tensor.nbytes for name, tensor in model.named_parameters() if "lora_" in name),
        "cross_kv": cross,
        "self_kv": own,
        "kept_tokens": kept,
        "before": before,
        "peak": highest,
    }


def _warm_up(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Generate without a picture, so that code and buffers that any first call loads are not counted."""
    text = {"input_ids": torch.ones_like(inputs["input_ids"]), "attention_mask": inputs["attention_mask"]}
    for how in ({}, {"cache_implementation": "trimmed"}):
        model.generate(**text, max_new_tokens=2, do_sample=False, **how)


def weights_by_part(model: Any) -> dict[str, int]:
    """Bytes of the weights by part, in the planner's words; adapters left out."""
    from trim_plugin.integrations.bitsandbytes import weight_memory

    return {name: size for name, size in weight_memory(model).rows() if name not in ("total", "adapters")}


def _child(model: Any, case: Case, device: str, pipe: Any) -> None:
    try:
        pipe.send(measure(model, case, device))
    except Exception as error:  # noqa: BLE001 - whatever fails in a case is reported as that case's result
        pipe.send(dataclasses.asdict(case) | {"error": f"{type(error).__name__}: {error}".splitlines()[0]})
        traceback.print_exc()


def _loader(key: tuple[str, str, bool], own: list[Case], device: str, folder: Path, pipe: Any) -> None:
    """Make a model with one thread (a thread pool would not survive the fork), then fork a process a case."""
    torch.set_num_threads(1)
    try:
        model = build(*key, device, folder)
    except Exception as error:  # noqa: BLE001 - reported for every case of this model
        for case in own:
            pipe.send(dataclasses.asdict(case) | {"error": f"{type(error).__name__}: {error}".splitlines()[0]})
        traceback.print_exc()
        return
    if device.startswith("cuda"):  # CUDA cannot be forked; the allocator's own peak needs no process a case
        for case in own:
            _child(model, case, device, pipe)
        return
    context = multiprocessing.get_context("fork")
    for case in own:
        process = context.Process(target=_child, args=(model, case, device, pipe))
        process.start()
        process.join()
        if process.exitcode != 0:
            pipe.send(dataclasses.asdict(case) | {"error": f"the process ended with status {process.exitcode}"})


def with_plan(row: dict[str, Any]) -> dict[str, Any]:
    """Add what the planner says about the same case, and its errors."""
    if "error" in row or row["lora"]:
        return row
    scenario, shape = SCENARIOS[row["scenario"]], row["shape"]
    config = planner_config(shape)
    tower = shape != "11b-layers"
    job = Job(
        batch=row["batch"],
        images=scenario.images,
        tiles=scenario.tiles,
        readable_images=scenario.readable,
        prompt_tokens=row["prompt_tokens"],
        new_tokens=NEW_TOKENS,
        tower=tower,
    )
    readable = scenario.readable * scenario.tiles * tile_tokens(config.vision_config)
    kept = max(row["kept_tokens"]) if row["kept_tokens"] else readable
    format = next((name for name in KV_FORMATS if f"{name} KV" in row["cache"]), None)
    share = None if row["cache"].startswith("stock") else min(1.0, kept / readable)
    plan = planner.plan(
        config,
        job,
        planner.PlannedVariant(row["cache"], share, kv_quantization=format),
        weights=PLANNED_WEIGHTS[row["weights"]],
    )
    left_out = () if tower else ("vision tower",)

    def total(parts: dict[str, int]) -> int:
        return sum(size for name, size in parts.items() if name.replace("_", " ") not in left_out)

    return row | {
        "planned": {
            "weights": total(plan.weights),
            "weights_error": total(plan.weights) / total(row["weights_by_part"]) - 1,
            "cross_kv": plan.cross_kv,
            "cross_kv_error": plan.cross_kv - row["cross_kv"],
            "self_kv": plan.self_kv,
            "generation": plan.peak - plan.weights_total,
            "generation_measured": row["peak"] - row["before"],
        }
    }


def planner_config(shape: str) -> Any:
    """The configuration of a benchmark's shape."""
    if shape != "small":
        return shape_config(shape)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(SMALL_MODEL)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, write and return the result."""
    if arguments.pieces:
        return pieces.run(arguments)
    if arguments.combined:
        return combined.run(arguments)
    wanted = cases(arguments)
    rows: list[dict[str, Any]] = []
    result = {
        "environment": environment(arguments.device),
        "quick": arguments.quick,
        "new_tokens": NEW_TOKENS,
        "rows": rows,
    }
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, Progress() as bar:
        task = bar.add_task("memory", total=len(wanted))
        for key, group in itertools.groupby(
            sorted(wanted, key=lambda case: case.model_key), key=lambda case: case.model_key
        ):
            own = list(group)
            bar.update(task, description=f"memory: {key[0]}, {key[1]}{', LoRA' if key[2] else ''}")
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_loader, args=(key, own, arguments.device, Path(folder), send))
            process.start()
            send.close()
            while True:
                try:
                    rows.append(with_plan(receive.recv()))
                except EOFError:
                    break
                bar.advance(task)
                write_result("memory", result, arguments.out)  # a run that is cut off leaves what it has
            process.join()
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    pieces.add_arguments(parser)
    parser.add_argument("--combined", action="store_true", help="memory: weights, adapter and cache at 11B, calculated")
