"""`trim-plugin demo`: questions about real pictures, stock beside trimmed."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trim_plugin.cache.report import TrimReport, format_bytes
from trim_plugin.commands import UserError
from trim_plugin.commands.common import (
    add_command,
    add_generation_options,
    check_counts,
    check_folder_of,
    picture_or_error,
    ways,
)
from trim_plugin.commands.loading import load_model
from trim_plugin.compat import CACHE, cache_of
from trim_plugin.config import DEFAULT_TOP_K_RATIO
from trim_plugin.embedded import examples
from trim_plugin.evaluation import Way, ways_for
from trim_plugin.forward.hooks import TrimmedCache
from trim_plugin.pictures.encoding import encode_pictures
from trim_plugin.pictures.prompting import build_inputs
from trim_plugin.pictures.visualize import visualize

#: The package's default first: its kept tokens are drawn.
DEFAULT_RATIOS = (f"{DEFAULT_TOP_K_RATIO:g}", "0.1")


@dataclasses.dataclass(frozen=True)
class Question:
    """A picture, what is asked about it, and the true answer if it is known."""

    name: str
    picture: Image.Image
    text: str
    truth: str | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """One generation: the text, its new tokens per second, and the report (None for stock)."""

    way: str
    text: str
    speed: float
    report: TrimReport | None


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = add_command(subparsers, "demo", run)
    parser.add_argument(
        "--image", type=Path, metavar="FILE", help="a picture (default: the held-out ones of the package)"
    )
    parser.add_argument("--prompt", help="a question about the picture (default: those of the held-out pictures)")
    add_generation_options(parser, " and ".join(DEFAULT_RATIOS), several=True)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("trim-demo.png"),
        metavar="FILE",
        help="where the picture of kept tokens goes: .png, .svg, .pdf or .jpg (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Answer, print the table, write the picture.

    Raises:
        UserError: an option is wrong.
    """
    console = Console()
    chosen = _with_exact(ways(arguments, DEFAULT_RATIOS, stock=True))
    check_counts(arguments, "max_new_tokens")
    _check_out(arguments.out)
    questions = _questions(arguments)
    model, processor = load_model(arguments)
    for question in questions:
        inputs = build_inputs(processor, question.text, [question.picture], model.device)
        with console.status(f"answering {question.text}"):
            answers = [_answer(model, processor, inputs, way, arguments.max_new_tokens) for way in chosen]
        if question is questions[0]:
            first = inputs, answers
        console.print(_table(question, answers))
    console.print(
        "exact drops only what decoding cannot read, so its answer is stock's. Speed: median of 3 runs of generate, prefill and "
        "vision tower included; benchmarks/ measures it properly.",
        style="dim",
        highlight=False,
    )
    console.print(_asked_again(model, processor, questions[0]), style="dim", highlight=False, markup=False)
    if _save_picture(arguments.out, model, questions[0], *first, chosen):
        console.print(f"kept visual tokens of the first picture: {arguments.out}", highlight=False)
    else:
        console.print("no picture of kept tokens: these ways choose nothing", highlight=False)


def _asked_again(model: Any, processor: Any, question: Question) -> str:
    """What a second question about a picture costs, with the vision tower and on what it yielded for the first."""
    inputs = build_inputs(processor, question.text, [question.picture], model.device)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "cross_attention_mask")}
    exact = {"top_k_ratio": 1.0}
    start = time.perf_counter()
    encoded = encode_pictures(model, processor, [question.picture])
    once = time.perf_counter() - start

    def first_token(**own: Any) -> float:
        start = time.perf_counter()
        model.generate(**own, max_new_tokens=1, do_sample=False)
        return time.perf_counter() - start

    times: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(3):
        times["with"].append(first_token(**inputs, cache_implementation="trimmed", cache_config=exact))
        known = TrimmedCache(model, exact, pictures=encoded)
        times["without"].append(first_token(**text, **{CACHE: known}))
    with_tower, without = (1000 * statistics.median(own) for own in times.values())
    return (
        f"A second question about {question.name}: {with_tower:.0f} ms to the first token with the vision tower, "
        f"{without:.0f} ms without it, on the picture encoded once in {1000 * once:.0f} ms (trim-plugin encode). Medians of 3."
    )


def _with_exact(chosen: list[Way]) -> list[Way]:
    """Stock, exact mode, then the rules: the second shows what costs nothing."""
    if any(way.config is not None and way.config.exact for way in chosen):
        return chosen
    return [chosen[0], *ways_for([1.0], stock=False), *chosen[1:]]


def _questions(arguments: argparse.Namespace) -> list[Question]:
    known = [
        Question(example.picture.name, picture_or_error(example.picture), example.question, example.answer)
        for example in examples()
    ]
    if arguments.image is None and arguments.prompt is None:
        return known
    if arguments.image is None:
        return [Question(known[0].name, known[0].picture, arguments.prompt)]
    return [Question(arguments.image.name, picture_or_error(arguments.image), arguments.prompt or known[0].text)]


def _answer(model: Any, processor: Any, inputs: dict[str, torch.Tensor], way: Way, new_tokens: int) -> Answer:
    settings = {} if way.config is None else {"cache_implementation": "trimmed", "cache_config": way.config}
    prompt, times = inputs["input_ids"].shape[1], []
    for _ in range(3):
        start = time.perf_counter()
        output = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, **settings
        )
        times.append(time.perf_counter() - start)
    new = output.sequences[0, prompt:]
    text = processor.decode(new, skip_special_tokens=True).strip()
    report = cache_of(output).report() if way.config is not None else None
    name = f"ratio {way.name}" if way.name[0].isdigit() else way.name
    return Answer(name, text, len(new) / sorted(times)[1], report)


def _table(question: Question, answers: list[Answer]) -> Table:
    truth = f"   [dim](true: {escape(question.truth)})[/dim]" if question.truth is not None else ""
    table = Table(
        title=f"[bold]{escape(question.text)}[/bold] {escape(question.name)}{truth}",
        title_justify="left",
        title_style="",
    )
    table.add_column("cache", no_wrap=True)
    table.add_column("answer", ratio=1)
    for name in ("visible", "kept", "cross KV", "of stock", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    trimmed = next(answer.report for answer in answers if answer.report is not None)
    visible, total = str(trimmed.visible_tokens[0]), str(trimmed.total_tokens[0])
    stock = [visible, total, format_bytes(trimmed.stock_cross_kv_bytes), "100.0 %"]
    for answer in answers:
        figures = stock if answer.report is None else _figures(answer.report)
        table.add_row(answer.way, escape(answer.text), *figures, f"{answer.speed:.0f}")
    return table


def _figures(report: TrimReport) -> list[str]:
    return [
        str(report.visible_tokens[0]),
        str(report.kept_tokens[0]),
        format_bytes(report.cross_kv_bytes),
        f"{100 * report.cross_kv_ratio:.1f} %",
    ]


def _check_out(path: Path) -> None:
    check_folder_of(path)
    if path.suffix.lower() not in {".png", ".svg", ".pdf", ".jpg"}:
        raise UserError(f"--out must end in .png, .svg, .pdf or .jpg, got {path.name}")


def _save_picture(
    path: Path,
    model: Any,
    question: Question,
    inputs: dict[str, torch.Tensor],
    answers: list[Answer],
    chosen: list[Way],
) -> bool:
    """Draw what the first rule that chooses keeps; False if there is none."""
    shown = next(((way, answer) for way, answer in zip(chosen, answers, strict=True) if _chooses(way)), None)
    if shown is None:
        return False
    way, answer = shown
    title = f"{question.text} {answer.text}\nkept by {answer.way}"
    try:
        visualize(model, inputs, way.config, title=title).savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    return True


def _chooses(way: Way) -> bool:
    return way.config is not None and not way.config.keeps_reachable
