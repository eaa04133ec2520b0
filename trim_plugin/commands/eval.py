"""`trim-plugin eval`: stock beside trimmed on a folder of one's own pictures and questions."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from trim_plugin.cache.report import format_bytes
from trim_plugin.commands import COMMANDS, UserError
from trim_plugin.commands.common import (
    DTYPES,
    check_device,
    check_is_mllama,
    check_ratio,
    first_line,
    load_model,
    pretrained_loader,
)
from trim_plugin.embedded import SMALL_MODEL
from trim_plugin.evaluation import (
    MATCHES,
    AnswerLog,
    Question,
    Summary,
    Way,
    evaluate,
    read_questions,
    summarize,
    ways_for,
    write_whole,
)
from trim_plugin.kv_formats import KV_FORMATS

DEFAULT_RATIOS = ("1.0", "0.5", "0.25", "0.1")
PRECISIONS = ("nf4", "fp4", "int8")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("eval", help=COMMANDS["eval"])
    parser.add_argument("--data", type=Path, required=True, help="folder with pictures and questions.jsonl")
    parser.add_argument("--questions", type=Path, help="another questions file (default: questions.jsonl in --data)")
    parser.add_argument(
        "--model", default=str(SMALL_MODEL), help="model folder or hub id (default: the embedded small model)"
    )
    parser.add_argument(
        "--weights", choices=PRECISIONS, help="quantize the weights with bitsandbytes (default: --dtype)"
    )
    parser.add_argument("--adapter", type=Path, help="a LoRA adapter's folder")
    parser.add_argument(
        "--top-k-ratio", action="append", metavar="RATIO", help="share that each head keeps; may be given again"
    )
    parser.add_argument(
        "--kept-share", action="append", metavar="SHARE", help="share that KCenter keeps; may be given again"
    )
    parser.add_argument("--kv-quantization", choices=tuple(KV_FORMATS), help="store the kept tokens in 8 or 4 bits")
    parser.add_argument(
        "--no-merge", action="store_true", help="forget what the rule drops, as in the paper (default: merge it)"
    )
    parser.add_argument("--no-stock", action="store_true", help="leave stock out; agreement is with the first ratio")
    parser.add_argument(
        "--match", choices=MATCHES, default="exact", help="how an answer is compared with the given ones"
    )
    parser.add_argument("--limit", type=int, help="only the first questions")
    parser.add_argument("--out", type=Path, default=Path("trim-eval"), help="folder of answers and summary")
    parser.add_argument(
        "--device", default="cpu", help="cpu, cuda, cuda:1; under a launcher, cuda means one GPU a process"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Answer what is missing in `--out`, then sum up if every process is done.

    Raises:
        UserError: an option is wrong, or a file cannot be read.
    """
    console = Console()
    process, processes = process_of(os.environ)
    ratios = [check_ratio(text) for text in arguments.top_k_ratio or DEFAULT_RATIOS]
    shares = [check_ratio(text, "--kept-share") for text in arguments.kept_share or ()]
    ways = ways_for(
        ratios, arguments.kv_quantization, shares=shares, merge=not arguments.no_merge, stock=not arguments.no_stock
    )
    questions = _questions(arguments)
    device = check_device(device_of(arguments.device, os.environ))
    check_is_mllama(arguments.model)
    log = _log(arguments, questions, process)
    model, processor = _load(arguments, device)
    share = questions[process::processes]
    with _progress(console, process) as progress:
        task = progress.add_task(f"{len(share)} questions", total=len(share) * len(ways))
        mine = {question.name for question in share}
        names = {way.name for way in ways}
        progress.advance(task, sum(a.question in mine and a.way in names for a in log.answers()))
        _user_errors(
            lambda: evaluate(
                model,
                processor,
                questions,
                ways,
                log,
                max_new_tokens=arguments.max_new_tokens,
                process=process,
                processes=processes,
                on_answer=lambda answer: progress.advance(task),
            )
        )
    answers = log.answers()
    rows = summarize(questions, ways, answers, arguments.match)
    if not rows or rows[0].questions < len(questions):
        console.print(f"process {process} of {processes} is done; the last one writes the summary", highlight=False)
        return
    _write_summary(arguments.out, rows)
    console.print(_table(rows, arguments.match))
    console.print(f"answers and summary: {arguments.out}", highlight=False)


def process_of(environment: Any) -> tuple[int, int]:
    """Which process this is and of how many, as `accelerate launch` and `torchrun` say.

    Example:
        >>> process_of({"RANK": "1", "WORLD_SIZE": "4"}), process_of({})
        ((1, 4), (0, 1))
    """
    return int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))


def device_of(device: str, environment: Any) -> str:
    """The device of this process: under a launcher every process takes a GPU of its own.

    Example:
        >>> device_of("cuda", {"LOCAL_RANK": "2", "WORLD_SIZE": "4"}), device_of("cpu", {"LOCAL_RANK": "2"})
        ('cuda:2', 'cpu')
    """
    several = int(environment.get("WORLD_SIZE", 1)) > 1
    return f"cuda:{environment.get('LOCAL_RANK', 0)}" if device == "cuda" and several else device


def _questions(arguments: argparse.Namespace) -> list[Question]:
    if not arguments.data.is_dir():
        raise UserError(f"--data: no such folder: {arguments.data}")
    for name in ("limit", "max_new_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be a positive number, got {value}")
    return _user_errors(lambda: read_questions(arguments.data, arguments.questions))[: arguments.limit]


def _log(arguments: argparse.Namespace, questions: list[Question], process: int) -> AnswerLog:
    asked = json.dumps([(q.name, [p.name for p in q.pictures], q.text) for q in questions]).encode()
    settings = {
        "model": str(arguments.model),
        "weights": arguments.weights or arguments.dtype,
        "adapter": None if arguments.adapter is None else str(arguments.adapter),
        "max_new_tokens": arguments.max_new_tokens,
        "questions": hashlib.sha256(asked).hexdigest()[:16],
    }
    return _user_errors(lambda: AnswerLog(arguments.out, settings, process))


def _load(arguments: argparse.Namespace, device: str) -> tuple[Any, Any]:
    if arguments.weights is None and arguments.adapter is None:
        return load_model(arguments.model, DTYPES[arguments.dtype], device)
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    weights = arguments.weights or names[arguments.dtype]
    try:
        return pretrained_loader()(
            arguments.model, weights, adapter=arguments.adapter, device_map={"": device}, dtype=DTYPES[arguments.dtype]
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load {arguments.model}: {first_line(error)}") from None


def _user_errors(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (FileNotFoundError, ValueError) as error:
        raise UserError(first_line(error)) from None


def _progress(console: Console, process: int) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=process > 0)


def _write_summary(folder: Path, rows: list[Summary]) -> None:
    write_whole(
        folder / "summary.json", json.dumps([dataclasses.asdict(row) for row in rows], indent=2, allow_nan=False) + "\n"
    )
    lines = ["| " + " | ".join(HEADINGS) + " |", "| --- |" + " ---: |" * (len(HEADINGS) - 1)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    write_whole(folder / "summary.md", "\n".join(lines) + "\n")


HEADINGS = ("cache", "n", "accuracy", "agree", "overlap", "kept", "KV", "s", "GPU")


def _cells(row: Summary) -> list[str]:
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f} %"

    return [
        row.way,
        str(row.questions),
        percent(row.accuracy),
        percent(row.agreement),
        percent(row.overlap),
        percent(row.kept_share),
        percent(row.cross_kv_ratio),
        f"{row.seconds:.3f}",
        "–" if row.peak_bytes is None else format_bytes(row.peak_bytes),
    ]


def _table(rows: list[Summary], match: str) -> Table:
    table = Table(
        title=f"agreement and overlap: with {rows[0].way}; accuracy: {match} match; kept: of the visible tokens; "
        "KV: of stock's bytes",
        title_justify="left",
        title_style="dim",
    )
    shown = len(HEADINGS) - all(row.peak_bytes is None for row in rows)  # the last one is the GPU's
    for heading in HEADINGS[:shown]:
        table.add_column(heading, justify="left" if heading == "cache" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row)[:shown])
    return table


__all__ = ["Way", "add_parser", "device_of", "process_of", "run"]
