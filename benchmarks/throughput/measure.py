"""Requests a second, one by one and many at once: ``python -m benchmarks throughput``.

Questions about pictures of one to four tiles, a third of them about a picture that was asked about before; answers of 1 to 40
tokens, drawn once (`requests`). "one by one" and "static 16" are `generate`, alone and in batches of 16 in the order of arrival;
"engine 8", "16" and "32" are `Engine` with so many running. Arrivals: all at once, or by a Poisson clock at three quarters of the
rate that the engine reached. Lengths are forced: nothing ends an answer early.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from typing import Any

import torch
from PIL import Image

from benchmarks.common.results import environment, write_result
from benchmarks.common.seeds import seed_everything
from benchmarks.throughput import predicted
from trim_plugin import Engine, TrimConfig
from trim_plugin.asking.answers import Inputs
from trim_plugin.embedded import examples, load_small_model
from trim_plugin.pictures.prompting import open_picture, written

REQUESTS, LONGEST, STATIC, RUNNING = 96, 40, 16, (8, 16, 32)


def requests(count: int, seed: int = 0) -> list[tuple[str, Image.Image, int]]:
    """Question, picture and length of every request."""
    draw = random.Random(seed)
    shown = [open_picture(example.picture) for example in examples()]
    side = max(shown[0].size)
    wide = [(1, 1), (2, 1), (1, 2), (2, 2)]
    made: list[Image.Image] = []
    found = []
    for _ in range(count):
        if made and draw.random() < 1 / 3:
            picture = draw.choice(made)
        else:
            across, down = draw.choice(wide)
            picture = Image.new("RGB", (across * side, down * side))
            for place in range(across * down):
                picture.paste(draw.choice(shown), (place % across * side, place // across * side))
            made.append(picture)
        found.append((draw.choice(examples()).question, picture, draw.randint(1, LONGEST)))
    return found


class Clock:
    """When the first token of a `generate` is there; a stopping criterion that stops nothing."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.first = self.first or time.monotonic()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generated(model: Any, processor: Any, asked: list[Any], config: TrimConfig, size: int) -> dict[str, Any]:
    """Batches of so many requests, one after the other; each batch is as long as its longest answer."""
    start = time.monotonic()
    firsts, each = [], []
    for begin in range(0, len(asked), size):
        batch = asked[begin : begin + size]
        prompts = [written(processor, question, 1) for question, _, _ in batch]
        inputs = Inputs.of(processor, prompts, [[picture] for _, picture, _ in batch])
        clock, longest = Clock(), max(length for *_, length in batch)
        model.generate(
            **inputs.arguments(model, config), max_new_tokens=longest, do_sample=False, stopping_criteria=[clock]
        )
        firsts += [(clock.first or time.monotonic()) - start] * len(batch)
        each += [(time.monotonic() - (clock.first or start)) / max(1, longest - 1)] * len(batch)
    return _row(asked, time.monotonic() - start, firsts, each, 0)


def engined(
    model: Any, processor: Any, asked: list[Any], config: TrimConfig, running: int, rate: float | None = None
) -> dict[str, Any]:
    """All at once, or so many requests a second on average."""
    draw, firsts, each, held = random.Random(1), [], [], [0]
    done = threading.Event()
    with Engine(model, processor, config, max_running=running) as engine:

        def watch() -> None:
            while not done.wait(0.01):
                held[0] = max(held[0], engine.stats()["held_bytes"])

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        start = time.monotonic()
        times: list[list[float]] = []
        sent = []
        for question, picture, length in asked:
            own: list[float] = [time.monotonic()]
            times.append(own)
            sent.append(
                engine.submit(
                    question,
                    images=[picture],
                    max_new_tokens=length,
                    listener=lambda _, own=own: own.append(time.monotonic()),
                )
            )
            if rate is not None:
                time.sleep(draw.expovariate(rate))
        answers = [request.result() for request in sent]
        seconds = time.monotonic() - start
        done.set()
        watcher.join()
    for own, answer in zip(times, answers, strict=True):
        firsts.append(own[1] - own[0])
        each.append((own[-1] - own[1]) / max(1, len(answer.tokens) - 1))
    return _row(asked, seconds, firsts, each, held[0])


def _row(asked: list[Any], seconds: float, firsts: list[float], each: list[float], held: int) -> dict[str, Any]:
    tokens = sum(length for *_, length in asked)
    return {
        "requests_a_second": len(asked) / seconds,
        "tokens_a_second": tokens / seconds,
        "first_median": statistics.median(firsts),
        "first_p95": _p95(firsts),
        "each_p95": _p95(each),
        "held_bytes": held,
    }


def _p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1] if len(values) > 1 else values[0]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, write and return the result; and what it means for 11B by arithmetic, which is all with `--predicted`."""
    said = predicted.run(arguments)
    if getattr(arguments, "predicted", False):
        return said or {}
    seed_everything()
    asked = requests(12 if arguments.quick else REQUESTS)
    config = TrimConfig()
    model, processor = load_small_model(device=arguments.device)
    model.generation_config.eos_token_id = None
    rows: dict[str, list[dict[str, Any]]] = {}
    for _ in range(1 if arguments.quick else arguments.turns):
        for name, measured in (
            ("one by one", lambda: generated(model, processor, asked, config, 1)),
            (f"static {STATIC}", lambda: generated(model, processor, asked, config, STATIC)),
            *(
                (f"engine {count}", lambda count=count: engined(model, processor, asked, config, count))
                for count in RUNNING
            ),
        ):
            rows.setdefault(name, []).append(measured())
    rate = 0.75 * statistics.median(row["requests_a_second"] for row in rows[f"engine {RUNNING[-1]}"])
    rows["engine 32, Poisson clock"] = [engined(model, processor, asked, config, RUNNING[-1], rate)]
    result = {
        "environment": environment(arguments.device),
        "quick": arguments.quick,
        "lengths": [length for *_, length in asked],
        "rate": rate,
        "rows": [
            {"way": name, "turns": len(own)}
            | {key: statistics.median(row[key] for row in own) for key in own[0]}
            | {
                "spread": [min(row["requests_a_second"] for row in own), max(row["requests_a_second"] for row in own)],
            }
            for name, own in rows.items()
        ],
    }
    write_result("throughput", result, arguments.out)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="throughput: turns of every way")
