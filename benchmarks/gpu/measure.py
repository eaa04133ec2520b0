"""What only a GPU can tell, in one command: ``python -m benchmarks gpu``.

The 11B configuration with random weights made on the device. Every figure is written as soon as it is there, so that a run that
is cut off keeps what it has; those that would not fit into the time left are named as left out. ``--tiny`` runs the same code on
a tiny configuration, on a CPU as well: a test, not a measurement. ``--predicted`` counts instead, see `predicted`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import CompileConfig

from benchmarks.common.decoding import Decoding, stock_cache
from benchmarks.common.device import kv_bytes, peak, start_peak, synchronize
from benchmarks.common.given_share import EvenlySpaced
from benchmarks.common.intervals import spread
from benchmarks.common.models import random_model
from benchmarks.common.results import environment, write_result
from benchmarks.common.scenarios import SCENARIOS, scenario_inputs
from benchmarks.common.seeds import seed_everything
from benchmarks.gpu import predicted, report
from benchmarks.gpu.parts import Stopwatch, median_seconds, parts_timed
from trim_plugin import KCenter, TrimConfig, TrimmedCache
from trim_plugin.arithmetic import tile_tokens
from trim_plugin.forward.encoded import EncodedSample
from trim_plugin.forward.tower import visual_states
from trim_plugin.selection.merging import merge_dropped

SECONDS = 510.0
LIMIT = 24 * 2**30
PICTURE_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


@dataclasses.dataclass
class Bench:
    """What every figure needs: the model, where it is, and when the run has to end."""

    model: Any
    device: str
    tiny: bool
    end: float

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def repeats(self, many: int) -> int:
        """How often something is measured."""
        return 2 if self.tiny else many


def prefill(bench: Bench) -> list[dict[str, Any]]:
    """Seconds of a page's prefill and its parts, stock and trimmed."""
    ways = {
        "stock": None,
        "exact": TrimConfig(top_k_ratio=1.0),
        "ratio 0.1": TrimConfig(top_k_ratio=0.1),
        "k-center 0.1": TrimConfig(processors=(KCenter(0.1),)),
    }
    rows = []
    inputs = scenario_inputs(bench.model, SCENARIOS["page"], 1)
    for name, config in ways.items():
        runs = []
        for _ in range(bench.repeats(5) + 1):
            watch = Stopwatch(bench.device)
            cache = stock_cache(bench.model) if config is None else TrimmedCache(bench.model, config)
            with parts_timed(bench.model, watch):
                watch.timed("whole", Decoding(bench.model, inputs, cache).prefill)()
            runs.append(watch.seconds)
        parts = {part: spread([run[part] for run in runs[1:]])["median"] for part in runs[-1]}
        rows.append({"way": name, **parts, "rest": parts["whole"] - sum(parts.values()) + parts["whole"]})
    return rows


def choosing(bench: Bench) -> list[dict[str, Any]]:
    """Seconds of k-center and of merging alone, for a page and for 32 video frames."""
    text, vision = bench.model.config.text_config, bench.model.config.vision_config
    tile = tile_tokens(vision)
    rows = []
    for name, tokens in (("page", 4 * tile), ("video", 32 * tile)):
        states = torch.randn(1, tokens, text.hidden_size, device=bench.device, dtype=bench.model.dtype)
        everything = torch.ones(1, tokens, dtype=torch.bool, device=bench.device)
        rule = KCenter(0.1)
        kept = rule.choose(states, everything)
        positions = kept[0].nonzero()[:, 0][None]
        keys = states[..., : text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)]
        joined = functools.partial(merge_dropped, keys, kept, 0 * everything.long(), everything.long(), positions)
        merging = joined()
        repeats = bench.repeats(3)
        rows.append(
            {
                "scenario": name,
                "tokens": tokens,
                "kept": positions.shape[1],
                "k-center": median_seconds(functools.partial(rule.choose, states, everything), bench.device, repeats),
                "assigning": median_seconds(joined, bench.device, repeats),
                "mean of states": median_seconds(functools.partial(merging.mean, states), bench.device, repeats),
            }
        )
    return rows


def decoding(bench: Bench, batch: int) -> list[dict[str, Any]]:
    """Seconds a token, stock dynamic and trimmed in turns, without compiling."""
    inputs = scenario_inputs(bench.model, SCENARIOS["page"], batch)
    ways: dict[str, TrimConfig | None] = {"stock": None, "exact": TrimConfig(top_k_ratio=1.0)}
    for share in (0.25, 0.1):
        # Random weights attend nearly evenly, so a processor keeps a given share; what is kept does not matter for time.
        for merge in (True, False):
            name = f"kept {share:g}, {'merged' if merge else 'dropped'}"
            ways[name] = TrimConfig(processors=(EvenlySpaced(share),), merge=merge)
    runs = {}
    for name, config in ways.items():
        runs[name] = Decoding(
            bench.model, inputs, stock_cache(bench.model) if config is None else TrimmedCache(bench.model, config)
        )
        runs[name].prefill()
        runs[name].step()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(bench.repeats(20)):
        for name, run in runs.items():
            synchronize(bench.device)
            start = time.perf_counter()
            run.step()
            synchronize(bench.device)
            times[name].append(time.perf_counter() - start)
    return [
        {
            "way": name,
            "batch": batch,
            "step_seconds": spread(times[name]),
            "step_ratio": spread([own / stock for own, stock in zip(times[name], times["stock"], strict=True)]),
            "cross_kv": kv_bytes(bench.model, run.cache)[0],
        }
        for name, run in runs.items()
    ]


def compiled(bench: Bench, batch: int) -> list[dict[str, Any]]:
    """Seconds a token of compiled decoding, stock's static cache and the trimmed one; and of the first call, which compiles."""
    inputs = scenario_inputs(bench.model, SCENARIOS["page"], batch)
    prompt, new = inputs["input_ids"].shape[1], 8 if bench.tiny else 48
    rows = []
    for way in ("stock static compiled", "trimmed compiled"):
        settings = _compiled(way, prompt + new, bench.tiny)

        def generate(count: int, settings: dict[str, Any] = settings) -> float:
            synchronize(bench.device)
            start = time.perf_counter()
            bench.model.generate(**inputs, do_sample=False, max_new_tokens=count, **settings)
            synchronize(bench.device)
            return time.perf_counter() - start

        first = generate(new)
        few, many = [], []
        for _ in range(bench.repeats(3)):
            many.append(generate(new))
            few.append(generate(2))
        step = (spread(many)["median"] - spread(few)["median"]) / (new - 2)
        rows.append({"way": way, "batch": batch, "first_call_seconds": first, "step_seconds": step})
        torch.compiler.reset()
    return rows


def _compiled(way: str, length: int, tiny: bool) -> dict[str, Any]:
    """Arguments of `generate` that compile decoding."""
    # In tiny, what is tested is this code, not torch's code generation.
    config = CompileConfig(
        fullgraph=True, **({"backend": "eager", "mode": None} if tiny else {"mode": "reduce-overhead"})
    )
    config._compile_all_devices = True
    if way.startswith("stock"):
        return {"cache_implementation": "static", "compile_config": config}
    own = TrimConfig(processors=(EvenlySpaced(0.25),), static=True, max_cache_len=length)
    return {"cache_implementation": "trimmed", "cache_config": own, "compile_config": config}


def first_token(bench: Bench) -> list[dict[str, Any]]:
    """Seconds to the first token about a page: from its pixels, and encoded, whole and a quarter."""
    inputs = scenario_inputs(bench.model, SCENARIOS["page"], 1)
    prompt = {name: tensor for name, tensor in inputs.items() if name not in PICTURE_INPUTS}
    with torch.no_grad():
        states = visual_states(bench.model.model, *(inputs[name] for name in PICTURE_INPUTS), at_a_time=1)
    states = states.flatten(0, 1)
    ways: dict[str, Callable[[], Any]] = {
        "stock": functools.partial(bench.model.generate, **inputs, max_new_tokens=1, do_sample=False)
    }
    for name, every in (("encoded, whole", 1), ("encoded, a quarter", 4)):
        index = torch.arange(0, len(states), every, device=states.device)
        sample = EncodedSample(states[index], index, torch.full_like(index, every), len(states))

        def answer(sample: EncodedSample = sample) -> Any:
            cache = TrimmedCache(bench.model, TrimConfig(top_k_ratio=1.0), pictures=sample)
            return bench.model.generate(**prompt, cache=cache, max_new_tokens=1, do_sample=False)

        ways[name] = answer
    seconds = {name: median_seconds(way, bench.device, bench.repeats(5)) for name, way in ways.items()}
    return [{"way": name, "seconds": own, "ratio": own / seconds["stock"]} for name, own in seconds.items()]


def throughput(bench: Bench, batch: int) -> list[dict[str, Any]]:
    """Seconds and peak of one `generate` over a batch of pages, stock and in pieces."""
    inputs = scenario_inputs(bench.model, SCENARIOS["page"], batch)
    new = 4 if bench.tiny else 16
    rows = []
    for name, how in _ways().items():
        before = start_peak(bench.device)
        try:
            seconds = median_seconds(
                lambda how=how: bench.model.generate(**inputs, max_new_tokens=new, do_sample=False, **how),
                bench.device,
                1,
            )
        except torch.OutOfMemoryError:
            rows.append({"way": name, "batch": batch, "out_of_memory": True})
            continue
        row = {"way": name, "batch": batch, "seconds": seconds, "peak_over_weights": peak(bench.device) - before}
        rows.append(row | {"pictures_per_second": batch / seconds, "tokens_per_second": batch * new / seconds})
    return rows


def largest_batch(bench: Bench) -> list[dict[str, Any]]:
    """Largest batch of pages that one `generate` takes within 24 GiB, found by trying. On a CPU nothing limits it: up to 4."""
    limited = bench.device.startswith("cuda")
    if limited:
        torch.cuda.empty_cache()
        fraction = min(1.0, LIMIT / torch.cuda.get_device_properties(bench.device).total_memory)
        torch.cuda.set_per_process_memory_fraction(fraction)
    rows = []
    try:
        for name, how in _ways().items():
            batch, tried = _search(bench, how, 2**16 if limited else 4)
            rows.append({"way": name, "largest_batch": batch, "tried": tried, "limit": LIMIT if limited else None})
    finally:
        if limited:
            torch.cuda.set_per_process_memory_fraction(1.0)
    return rows


def _ways() -> dict[str, dict[str, Any]]:
    small = TrimConfig(processors=(EvenlySpaced(0.1),))
    ways: dict[str, dict[str, Any]] = {
        "stock": {},
        "kept 0.1": {"cache_implementation": "trimmed", "cache_config": small},
    }
    if importlib.util.find_spec("bitsandbytes") is not None:
        config = dataclasses.replace(small, kv_quantization="nf4")
        ways["kept 0.1, nf4 KV"] = {"cache_implementation": "trimmed", "cache_config": config}
    return ways


def _search(bench: Bench, how: dict[str, Any], most: int) -> tuple[int, int]:
    """Double until it does not fit, then halve the interval; ends early, with what is known, when time is short."""
    tried = 0

    def fits(batch: int) -> bool:
        nonlocal tried
        tried += 1
        # On the CPU until a piece wants them: the prompt's pixels shall not be what is measured.
        inputs = {name: one.cpu() for name, one in scenario_inputs(bench.model, SCENARIOS["page"], batch).items()}
        try:
            bench.model.generate(**inputs, max_new_tokens=4, do_sample=False, **how)
        except torch.OutOfMemoryError:
            return False
        finally:
            if bench.device.startswith("cuda"):
                torch.cuda.empty_cache()
        return True

    low, high = 0, 1
    while high <= most and bench.left > 30 and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 8) and low and high <= most and bench.left > 30:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, tried


#: Name → figure, and the seconds that it is expected to take at 11B on an H100, compiling included. In the order of their worth.
FIGURES: dict[str, tuple[Callable[[Bench], Any], float]] = {
    "prefill": (prefill, 15),
    "choosing": (choosing, 10),
    "decoding, batch 1": (lambda bench: decoding(bench, 1), 15),
    "first token": (first_token, 10),
    "throughput, batch 16": (lambda bench: throughput(bench, 2 if bench.tiny else 16), 40),
    "largest batch in 24 GiB": (largest_batch, 60),
    "compiled, batch 1": (lambda bench: compiled(bench, 1), 100),
    "decoding, batch 8": (lambda bench: decoding(bench, 2 if bench.tiny else 8), 20),
    "decoding, batch 32": (lambda bench: decoding(bench, 3 if bench.tiny else 32), 40),
    "compiled, batch 8": (lambda bench: compiled(bench, 2 if bench.tiny else 8), 100),
    "compiled, batch 32": (lambda bench: compiled(bench, 3 if bench.tiny else 32), 100),
}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in the order of worth, write after every figure, and return the result; or only predict."""
    if arguments.predicted:
        result = predicted.run(arguments)
        print(report.tables(result))
        return result
    device = arguments.device if arguments.tiny or arguments.device != "cpu" else "cuda"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks gpu needs a CUDA device, and there is none; --tiny runs the same code on a CPU, --predicted counts."
        )
    end = time.monotonic() + arguments.seconds
    seed_everything()
    shape = "tiny" if arguments.tiny else "11b"
    name = "gpu-tiny" if arguments.tiny else "gpu"
    result: dict[str, Any] = {"environment": environment(device), "shape": shape, "figures": {}, "left_out": {}}
    write_result(name, result, arguments.out)
    start = time.monotonic()
    bench = Bench(
        random_model(shape, torch.float32 if arguments.tiny else torch.bfloat16, device), device, arguments.tiny, end
    )
    result["model_seconds"] = time.monotonic() - start
    for figure, (measure, expected) in FIGURES.items():
        if bench.left < (0 if arguments.tiny else expected):
            result["left_out"][figure] = f"{max(0, bench.left):.0f} s were left, about {expected:.0f} s are needed"
        else:
            start = time.monotonic()
            try:
                result["figures"][figure] = measure(bench)
            except (torch.OutOfMemoryError, RuntimeError, NotImplementedError, ImportError) as error:
                result["left_out"][figure] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{figure}: {time.monotonic() - start:.0f} s", flush=True)
        write_result(name, result, arguments.out)
    if not arguments.tiny:
        print(report.beside(result, predicted.predict(shares=())))
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--tiny", action="store_true", help="gpu: a tiny configuration, on any device, as a test")
    parser.add_argument(
        "--predicted", action="store_true", help="gpu, throughput: count what a GPU would do, without one"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="gpu: time for the whole run")
