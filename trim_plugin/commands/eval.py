"""`trim-plugin eval`: stock beside trimmed on a folder of one's own pictures and questions."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from trim_plugin.commands import FAILED_ROWS, UserError, common, loading, plain_console, user_errors
from trim_plugin.commands.batch import SHOWN_ERRORS
from trim_plugin.config import DEFAULT_KEPT_SHARE
from trim_plugin.durable import write_whole
from trim_plugin.evaluation.log import Answer, AnswerLog
from trim_plugin.evaluation.questions import Question, read_questions
from trim_plugin.evaluation.summary import MATCHES, Summary, lacks, silent, summarize, whole_variants
from trim_plugin.variants import Variant

if TYPE_CHECKING:
    from rich.console import Console

    from trim_plugin.evaluation.page import Shown

#: Exact mode, and `KCenter` with the package's default between a larger share and a smaller one.
DEFAULT_RATIOS, DEFAULT_SHARES = (1.0,), (0.5, DEFAULT_KEPT_SHARE, 0.1)


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    ratios, shares = (" and ".join(f"{value:g}" for value in values) for values in (DEFAULT_RATIOS, DEFAULT_SHARES))
    parser = common.add_command(
        subparsers, "eval", run, [common.generation_options(ratios=ratios, shares=shares, several=True)]
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder with pictures and questions.jsonl, rows as for batch",
    )
    parser.add_argument(
        "--questions", type=Path, metavar="FILE", help="another questions file (default: questions.jsonl in --data)"
    )
    parser.add_argument(
        "--no-stock",
        action="store_true",
        help="leave stock out; agreement is with the first rule (default: agreement is with stock)",
    )
    parser.add_argument(
        "--match",
        choices=MATCHES,
        default="exact",
        help="whether an answer must equal a given one or contain it (default: %(default)s)",
    )
    common.add_engine_options(
        parser,
        "questions that a trimmed cache answers at once; stock answers one at a time. With 1 all do, for times and memory "
        "that compare",
        "questions that are answered at once",
    )
    common.add_count(parser, "--limit", "only the first questions (default: all)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("trim-eval"),
        metavar="FOLDER",
        help="answers, summary and report; the same command goes on there (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Answer what is missing in `--out`, then sum up if every process is done; a variant without an answer is a `UserError`."""
    console = plain_console()
    process, processes = loading.process_of(os.environ)
    chosen = common.checked_rules(arguments, ratios=DEFAULT_RATIOS, shares=DEFAULT_SHARES, stock=not arguments.no_stock)
    memory = common.memory_of(arguments)
    if memory is not None and arguments.max_running == 1:
        raise UserError("--memory is for questions that are answered at once, but --max-running is 1. Leave one out")
    questions = _questions(arguments)
    loading.begin_loading(arguments)
    from trim_plugin.evaluation.run import evaluate

    loading.check_device(loading.device_of(arguments.device, os.environ))
    log = _log(arguments, questions, process)
    model, processor = loading.load_model(arguments)
    share = questions[process::processes]
    with user_errors(OSError, ValueError), common.progress(console, process) as bar:
        task = bar.add_task(f"{len(share)} questions", total=len(share) * len(chosen))
        mine, names = {question.name for question in share}, {variant.name for variant in chosen}
        bar.advance(task, sum(a.question in mine and a.way in names and not a.error for a in log.answers()))
        evaluate(
            model,
            processor,
            questions,
            chosen,
            log,
            max_new_tokens=arguments.max_new_tokens,
            max_running=arguments.max_running,
            memory=memory,
            process=process,
            processes=processes,
            on_answer=lambda answer: bar.advance(task),
        )
        answers = log.answers()
    complete = whole_variants(questions, chosen, answers)
    if not names <= {variant.name for variant in complete}:
        console.print(f"process {process} of {processes} is done; the last one writes the summary")
        return
    pictures = functools.partial(_shown, model, processor)
    compared = _sum_up(console, arguments, questions, complete, answers, pictures)
    mute = silent(chosen, answers)
    if mute or not compared:
        which = f"with {', '.join(mute)}" if mute else "by all variants, so there is nothing to compare"
        mend = "Mend what the errors say, then give the same command: what is answered stays"
        raise UserError(f"no question was answered {which}. {mend}", FAILED_ROWS)


def _sum_up(
    console: Console,
    arguments: argparse.Namespace,
    questions: Sequence[Question],
    complete: Sequence[Variant],
    answers: Sequence[Answer],
    pictures: Callable[[Question], list[Shown]],
) -> bool:
    """Write the summary of variants that have dealt with every question, and show it; whether there is anything in it."""
    from trim_plugin.evaluation.page import note

    rows = summarize(questions, complete, answers, arguments.match)
    remarks = lacks(questions, complete, answers)
    _write(arguments, rows, questions, answers, pictures, remarks)
    if rows:
        console.print(_table(rows, arguments.match))
        if note(rows):
            console.print(note(rows), style="dim")
    for remark in remarks:
        console.print(remark, style="red")
    # One that has answered nothing leaves no question out of the summary of the others.
    compared = {row.way for row in rows} or {answer.way for answer in answers}
    errors: dict[str, str] = {}
    for answer in answers:
        if answer.error and answer.way in compared:
            errors.setdefault(answer.question, answer.error)
    unread = [question.name for question in questions if question.name in errors]
    for name in unread[:SHOWN_ERRORS]:
        console.print(f"question {name} is left out: {errors[name]}", style="red")
    if len(unread) > SHOWN_ERRORS:
        console.print(f"and {len(unread) - SHOWN_ERRORS} more are left out; the answers' files say why", style="red")
    console.print(f"answers, summary and report.html: {arguments.out}")
    return bool(rows)


def _questions(arguments: argparse.Namespace) -> list[Question]:
    if not arguments.data.is_dir():
        raise UserError(f"--data: no such folder: {arguments.data}")
    with user_errors(FileNotFoundError, ValueError):
        return read_questions(arguments.data, arguments.questions)[: arguments.limit]


def _log(arguments: argparse.Namespace, questions: list[Question], process: int) -> AnswerLog:
    asked = json.dumps(
        [(q.name, [p.name for p in q.pictures], q.messages or q.text, q.max_new_tokens) for q in questions]
    ).encode()
    settings = loading.settings_of(arguments) | {"questions": hashlib.sha256(asked).hexdigest()[:16]}
    with user_errors(OSError, ValueError):
        return AnswerLog(arguments.out, settings, process)


def _shown(model: Any, processor: Any, question: Question) -> list[Shown]:
    """A question's pictures as the model sees them."""
    import numpy as np
    from PIL import Image

    from trim_plugin.arithmetic import picture_tokens
    from trim_plugin.evaluation.page import Shown
    from trim_plugin.pictures.prompting import build_inputs, open_picture
    from trim_plugin.pictures.visualize import picture_as_seen, tile_map_of

    inputs = build_inputs(
        processor, question.messages or question.text, [open_picture(picture) for picture in question.pictures]
    )
    maps = [tile_map_of(model, inputs, 0, number) for number in range(len(question.pictures))]
    total = len(maps) * picture_tokens(model.config.vision_config)
    return [
        Shown(Image.fromarray(np.rint(255 * picture_as_seen(inputs, number, place)).astype(np.uint8)), place, total)
        for number, place in enumerate(maps)
    ]


def _write(
    arguments: argparse.Namespace,
    rows: list[Summary],
    questions: Sequence[Question],
    answers: Sequence[Answer],
    pictures: Callable[[Question], list[Shown]],
    remarks: Sequence[str],
) -> None:
    from trim_plugin.evaluation.page import cells, note, report_html, shown_headings

    folder = arguments.out
    write_whole(
        folder / "summary.json", json.dumps([dataclasses.asdict(row) for row in rows], indent=2, allow_nan=False) + "\n"
    )
    lines = []
    if rows:
        shown = shown_headings(rows)
        lines += ["| " + " | ".join(shown) + " |", "| --- |" + " ---: |" * (len(shown) - 1)]
        lines += ["| " + " | ".join(cells(row)[name] for name in shown) + " |" for row in rows]
    for remark in [note(rows), *remarks]:
        lines += ["", remark] if remark else []
    write_whole(folder / "summary.md", "\n".join(lines).lstrip() + "\n")
    write_whole(folder / "report.html", report_html(questions, rows, answers, pictures, arguments.match, remarks))


def _table(rows: list[Summary], match: str) -> Table:
    from trim_plugin.evaluation.page import cells, shown_headings

    table = Table(
        title=f"agree and overlap with {rows[0].way}; right: {match} match; KV: of stock's bytes",
        title_justify="left",
        title_style="dim",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    shown = shown_headings(rows)
    for heading in shown:
        first = heading == "cache"
        table.add_column(heading, justify="left" if first else "right", no_wrap=not first, overflow="fold")
    for row in rows:
        table.add_row(*(cells(row)[name] for name in shown))
    return table
