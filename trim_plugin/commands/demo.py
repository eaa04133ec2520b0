"""`trim-plugin demo`: questions about real pictures, stock beside trimmed."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trim_plugin.cache.report import TrimReport, format_bytes
from trim_plugin.commands import COMMANDS, UserError
from trim_plugin.commands.common import DTYPES, check_device, check_ratio, load_model, picture_or_error
from trim_plugin.config import TrimConfig
from trim_plugin.embedded import SMALL_MODEL, examples
from trim_plugin.pictures.prompting import build_inputs
from trim_plugin.pictures.visualize import visualize

DEFAULT_RATIOS = ("0.25", "0.1")


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
    parser = subparsers.add_parser("demo", help=COMMANDS["demo"])
    parser.add_argument(
        "--model", default=str(SMALL_MODEL), help="model folder or hub id (default: the embedded small model)"
    )
    parser.add_argument("--image", type=Path, help="a picture (default: the embedded held-out pictures)")
    parser.add_argument("--prompt", help="a question about the picture")
    parser.add_argument(
        "--top-k-ratio", action="append", metavar="RATIO", help="share that each head keeps; may be given again"
    )
    parser.add_argument("--out", type=Path, default=Path("trim-demo.png"), help="where the picture of kept tokens goes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Answer, print the table, write the picture.

    Raises:
        UserError: an option is wrong.
    """
    console = Console()
    ratios = [check_ratio(text) for text in arguments.top_k_ratio or DEFAULT_RATIOS]
    _check_out(arguments.out)
    questions = _questions(arguments)
    device = check_device(arguments.device)
    model, processor = load_model(arguments.model, DTYPES[arguments.dtype], device)
    for question in questions:
        inputs = build_inputs(processor, question.text, [question.picture], device)
        with console.status(f"answering {question.text}"):
            answers = _answers(model, processor, inputs, ratios, arguments.max_new_tokens)
        console.print(_table(question, answers))
    console.print(
        "exact drops only what decoding cannot read, so its answer is stock's. Speed: median of 3 runs of generate, prefill and "
        "vision tower included; benchmarks/ measures it properly.",
        style="dim",
        highlight=False,
    )
    _save_picture(
        arguments.out, model, build_inputs(processor, questions[0].text, [questions[0].picture], device), ratios
    )
    console.print(f"kept visual tokens of the first picture: {arguments.out}", highlight=False)


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


def _answers(
    model: Any, processor: Any, inputs: dict[str, torch.Tensor], ratios: list[float], new_tokens: int
) -> list[Answer]:
    ways: list[tuple[str, TrimConfig | None]] = [("stock", None)]
    if 1.0 not in ratios:
        ways.append(("exact", TrimConfig(top_k_ratio=1.0)))
    ways += [(f"ratio {ratio:g}" if ratio < 1 else "exact", TrimConfig(top_k_ratio=ratio)) for ratio in ratios]
    return [_answer(model, processor, inputs, way, config, new_tokens) for way, config in ways]


def _answer(
    model: Any, processor: Any, inputs: dict[str, torch.Tensor], way: str, config: TrimConfig | None, new_tokens: int
) -> Answer:
    settings = {} if config is None else {"cache_implementation": "trimmed", "cache_config": config}
    prompt, times = inputs["input_ids"].shape[1], []
    for _ in range(3):
        start = time.perf_counter()
        output = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, **settings
        )
        times.append(time.perf_counter() - start)
    new = output.sequences[0, prompt:]
    text = processor.decode(new, skip_special_tokens=True).strip()
    report = output.past_key_values.report() if config is not None else None
    return Answer(way, text, len(new) / sorted(times)[1], report)


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
    if not path.resolve().parent.is_dir():
        raise UserError(f"--out: no such folder: {path.resolve().parent}")
    if path.suffix.lower() not in {".png", ".svg", ".pdf", ".jpg"}:
        raise UserError(f"--out must end in .png, .svg, .pdf or .jpg, got {path.name}")


def _save_picture(path: Path, model: Any, inputs: dict[str, torch.Tensor], ratios: list[float]) -> None:
    ratio = next((ratio for ratio in ratios if ratio < 1), float(DEFAULT_RATIOS[0]))
    figure = visualize(model, inputs, {"top_k_ratio": ratio}, title=f"Visual tokens kept at top_k_ratio = {ratio:g}")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
