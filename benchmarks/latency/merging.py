"""What merging costs: ``python -m benchmarks latency --merging``.

Decoding: merged and dropped at the same kept tokens differ in the mask alone. Eager, both take every step in turns in one
process; compiled, whole generations take turns. "dropped again" is dropped against itself: its ratio is the noise.

Choosing: k-center and merging of one page at the 11B model's widths, 6,404 visual tokens to 641. Operations that a GPU would
launch and the bytes they touch are counted; seconds are set beside the prefill of a whole 11B model, whose layers are
measured one by one on this machine.
"""

from __future__ import annotations

import argparse
import collections
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import Progress
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessorList
from transformers.models.mllama.modeling_mllama import MllamaVisionEncoderLayer

from benchmarks.common.decoding import Decoding, stock_cache
from benchmarks.common.device import synchronize
from benchmarks.common.given_share import EvenlySpaced
from benchmarks.common.intervals import median_interval, spread
from benchmarks.common.models import DTYPE, load_shape, transformers_config
from benchmarks.common.results import environment, write_result
from benchmarks.common.scenarios import SCENARIOS, scenario_inputs
from benchmarks.common.seeds import seed_everything
from benchmarks.latency.compiled import StepClock, bucket_of, settings_of
from benchmarks.latency.layers import layers_timed
from trim_plugin import KCenter, TrimmedCache
from trim_plugin.selection.merging import merge_dropped
from trim_plugin.selection.visibility import pack

KEPT = 0.1
WAYS = {"dropped": False, "dropped again": False, "merged": True}
#: The text model's width, key-value heads and head size, and a page's visual tokens, of Llama-3.2-11B-Vision.
WIDTH, KV_HEADS, HEAD_DIM, TOKENS = 4096, 8, 128, 6404


def eager(model: Any, name: str, batch: int, steps: int, device: str) -> dict[str, list[float]]:
    """Seconds of every decoding step, all ways in turns."""
    inputs = scenario_inputs(model, SCENARIOS[name], batch)
    runs = {}
    for way, merge in WAYS.items():
        cache = TrimmedCache(model, {"processors": [EvenlySpaced(KEPT)], "merge": merge})
        runs[way] = Decoding(model, inputs, cache)
        runs[way].prefill()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for step in range(steps + 2):
        for way in WAYS if step % 2 == 0 else tuple(reversed(WAYS)):
            seconds = timed(runs[way].step, device)
            if step >= 2:
                times[way].append(seconds)
    return times


def compiled(model: Any, shape: str, name: str, rounds: int, device: str) -> dict[str, list[float]]:
    """Median seconds a token of whole compiled generations, all ways in turns."""
    inputs = scenario_inputs(model, SCENARIOS[name], 1)
    prompt, new_tokens = inputs["input_ids"].shape[1], 48
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(rounds + 1):  # the first one compiles
        for way in WAYS if turn % 2 == 0 else tuple(reversed(WAYS)):
            settings = settings_of("trimmed compiled", prompt, new_tokens, bucket_of(shape))
            settings["cache_config"] |= {"processors": [EvenlySpaced(KEPT)], "merge": WAYS[way]}
            clock = StepClock(device)
            clocks = LogitsProcessorList([clock])
            model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, logits_processor=clocks, **settings)
            if turn:
                times[way].append(spread(clock.steps())["median"])
    return times


def against_dropped(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Rows of a table: time a step, and its ratio to dropped's with a 95 % interval of the median."""
    rows = []
    for way, seconds in times.items():
        ratios = [own / dropped for own, dropped in zip(seconds, times["dropped"], strict=True)]
        rows.append(
            {"way": way, "step_seconds": spread(seconds), "ratio": spread(ratios), "interval": median_interval(ratios)}
        )
    return rows


class Launches(TorchDispatchMode):
    """Counts operations that do work (views don't), and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.count: collections.Counter[str] = collections.Counter()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        several = result if isinstance(result, tuple | list) else [result]  # a number, too, comes out of an operation
        outputs = [tensor for tensor in several if isinstance(tensor, torch.Tensor)]
        given = [value for value in [*args, *(kwargs or {}).values()] if isinstance(value, torch.Tensor)]
        storages = {tensor.untyped_storage().data_ptr() for tensor in given}
        is_view = all(tensor.untyped_storage().data_ptr() in storages for tensor in outputs)
        name = function.name().removeprefix("aten::").split(".")[0]
        if outputs and not (is_view and not function._schema.is_mutable) and not name.startswith("empty"):
            self.count[name] += 1
            # Of what is gathered from, as much is read as is written.
            read = outputs if name == "gather" else given
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in [*read, *outputs])
        return result


def choosing(device: str, repeats: int) -> dict[str, Any]:
    """K-center and merging of one page: seconds, launches and bytes of each part."""
    dtype = torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, TOKENS, WIDTH, generator=generator).to(device, dtype)
    keys = torch.randn(1, TOKENS, KV_HEADS, HEAD_DIM, generator=generator).to(device, dtype).transpose(1, 2)
    members = torch.ones(1, TOKENS, dtype=torch.bool, device=device)
    groups = torch.zeros(1, TOKENS, dtype=torch.long, device=device)
    rule = KCenter(KEPT)
    kept = rule.choose(states, members)
    positions = pack(kept)[0]
    merging = merge_dropped(keys.transpose(1, 2).flatten(2), kept, groups, groups + 1, positions)
    parts: dict[str, Callable[[], Any]] = {
        "k-center": lambda: rule.choose(states, members),
        "who joins whom": lambda: merge_dropped(keys.transpose(1, 2).flatten(2), kept, groups, groups + 1, positions),
        "means of states, keys and values": lambda: [merging.mean(tensor) for tensor in (states, keys, keys)],
    }
    rows = []
    for name, part in parts.items():
        with Launches() as launches:
            part()
        seconds = spread([timed(part, device) for _ in range(repeats)])
        rows.append({"part": name, "launches": launches.count.total(), "bytes": launches.bytes, "seconds": seconds})
    return {"tokens": TOKENS, "kept": int(kept.sum()), "width": WIDTH, "rows": rows}


@torch.no_grad()
def prefill_seconds(text_layers: Any, device: str, repeats: int) -> dict[str, float]:
    """Seconds of an 11B prefill of one page, layer by layer: 32 self- and 8 cross-attention layers, 40 of the vision tower."""
    inputs = scenario_inputs(text_layers, SCENARIOS["page"], 1)
    layers: dict[str, list[float]] = {}
    Decoding(text_layers, inputs, stock_cache(text_layers)).prefill()  # to warm up
    for _ in range(repeats):
        with layers_timed(text_layers, device, layers):
            Decoding(text_layers, inputs, stock_cache(text_layers)).prefill()
    config = transformers_config("11b").vision_config
    config._attn_implementation = "sdpa"
    layer = MllamaVisionEncoderLayer(config).to(device, torch.bfloat16).eval()
    # Every tile is padded from 1,601 to 1,608 patches.
    patches = config.max_num_tiles * 1608
    hidden = torch.randn(1, patches, config.hidden_size, device=device, dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, patches, patches, device=device, dtype=torch.bfloat16)
    layers["vision"] = [timed(lambda: layer(hidden, mask), device) for _ in range(repeats)]
    found = {kind: spread(seconds)["median"] for kind, seconds in layers.items()}
    count = {"self": 32, "cross": 8, "vision": config.num_hidden_layers + config.num_global_layers}
    return {**found, "whole": sum(found[kind] * number for kind, number in count.items())}


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds that it takes."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, write and return the result."""
    seed_everything()
    device, quick = arguments.device, arguments.quick
    decoding, share = [], None
    with Progress() as bar:
        task = bar.add_task("merging", total=len(arguments.shapes))
        for shape in arguments.shapes:
            model = load_shape(shape, getattr(torch, DTYPE[shape]), device)
            small = shape == "small"
            names = ("page",) if quick or not small else ("page", "pages", "video")
            for name in names:
                for batch in arguments.batches or ((1,) if quick else (1, 8) if small else (1, 4)):
                    steps = (40 if small else 12) if quick else (201 if small else 40)
                    rows = against_dropped(eager(model, name, batch, steps, device))
                    decoding.append({"shape": shape, "scenario": name, "batch": batch, "how": "eager", "rows": rows})
                rows = against_dropped(compiled(model, shape, name, (3 if quick else 15) if small else 3, device))
                decoding.append({"shape": shape, "scenario": name, "batch": 1, "how": "compiled", "rows": rows})
            if not small:
                share = choosing(device, 2 if quick else 7) | {"prefill": prefill_seconds(model, device, 2)}
            bar.advance(task)
    result = {
        "environment": environment(device),
        "quick": quick,
        "kept": KEPT,
        "decoding": decoding,
        "choosing": share,
    }
    write_result("merging", result, arguments.out)
    return result
