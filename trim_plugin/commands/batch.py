"""`trim-plugin batch`: answer a file of rows, however many, however often interrupted."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TextColumn

from trim_plugin.batching.questions import read_rows
from trim_plugin.batching.remembered import PictureFolder
from trim_plugin.batching.results import Results
from trim_plugin.batching.worker import Worker
from trim_plugin.commands import UserError
from trim_plugin.commands.common import (
    add_command,
    add_generation_options,
    check_counts,
    one_way,
    progress,
    user_errors,
)
from trim_plugin.commands.loading import (
    check_device,
    device_of,
    load_model,
    model_of,
    process_of,
    settings_of,
    weights_of,
)
from trim_plugin.evaluation import Way

Rows = list[dict[str, Any]]
#: So many batches' rows are sorted at a time: enough for batches of like rows, few enough to begin at once.
WINDOW = 32
ENGINES = ("local", "ray")
#: Errors that are shown at the end; all of them stand in the file.
SHOWN_ERRORS = 3


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = add_command(subparsers, "batch", run, model_word=True)
    parser.add_argument(
        "--questions",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON Lines: {"id": ..., "images": [...], "question": ...} or "messages"; names of pictures start from its folder',
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="results in JSON Lines, appended as they come; the same command goes on there",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="most pictures of one call (default: what fits into the memory at hand by `trim-plugin plan`)",
    )
    parser.add_argument(
        "--retry-errors",
        action="store_true",
        help="answer rows whose result is an error again (default: an error is a result)",
    )
    parser.add_argument(
        "--pictures-cache",
        type=Path,
        metavar="FOLDER",
        help="keep pictures there as the vision tower made them: once a picture, not once a row (default: keep none)",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="this process, with its share under a launcher, or a Ray cluster (default: %(default)s)",
    )
    parser.add_argument(
        "--actors", type=int, metavar="N", help="workers of --engine ray (default: one for every GPU, or 1)"
    )
    add_generation_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Answer the rows of this process that have no result in `--out` yet.

    Raises:
        UserError: an option is wrong, a file cannot be read, or the model cannot be loaded.
    """
    console = Console(stderr=True)
    way = one_way(arguments)
    check_counts(arguments, "max_new_tokens", "batch_size", "actors")
    process, processes = process_of(os.environ)
    with user_errors(OSError, ValueError):
        rows = read_rows(arguments.questions)[process::processes]
    if arguments.engine == "ray" and arguments.pictures_cache is not None:
        raise UserError("--pictures-cache goes with --engine local")
    if arguments.engine == "local":  # a cluster's devices are not this machine's
        check_device(device_of(arguments.device, os.environ))
    with user_errors(OSError, ValueError):
        results = Results(arguments.out, settings_of(arguments) | {"rule": way.name})
    if arguments.retry_errors:
        results.forget_errors({row["id"] for row in rows})
    done = sum(row["id"] in results.ids for row in rows)
    missing = [row for row in rows if row["id"] not in results.ids]
    results.add({"id": row["id"], "error": row["broken"]} for row in missing if "broken" in row)
    missing = [row for row in missing if "broken" not in row]
    errors: Rows = []
    if missing:
        answered = _answered_by_ray if arguments.engine == "ray" else _answered_here
        with progress(console, process, TextColumn("{task.fields[speed]}")) as bar:
            task = bar.add_task("rows", total=len(rows), completed=len(rows) - len(missing), speed="")
            pictures = {row["id"]: _pictures(row) for row in missing}
            seen = 0
            for batch in answered(arguments, way, missing):
                results.add(batch)
                seen += sum(pictures[result["id"]] for result in batch)
                errors += [result for result in batch if "error" in result]
                elapsed = bar.tasks[task].elapsed or 0.0
                speed = f"{seen / elapsed:.3g} pictures/s" if elapsed else ""
                bar.update(task, advance=len(batch), speed=speed)
    _sum_up(console, arguments.out, rows, results, done, errors)


def _answered_here(arguments: argparse.Namespace, way: Way, rows: Rows) -> Iterator[Rows]:
    model, processor = load_model(arguments)
    encode = None
    if arguments.pictures_cache is not None:
        with user_errors(OSError, ValueError):
            share = None if way.config is None else way.config.tower_share
            encode = PictureFolder(arguments.pictures_cache, model, processor, tower_share=share)
    worker = Worker(
        model,
        processor,
        way.config,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        folder=arguments.questions.parent,
        encode=encode,
    )
    step = WINDOW * worker.batch_size
    for start in range(0, len(rows), step):
        for batch in worker.answers(rows[start : start + step]):
            yield [result for _, result in batch]


def _answered_by_ray(arguments: argparse.Namespace, way: Way, rows: Rows) -> Iterator[Rows]:
    """The installed engine's results; integrations know the package, not the other way round, so it is found by its name."""
    found = importlib.metadata.entry_points(group="trim_plugin.engines", name=arguments.engine)
    with user_errors(ImportError):
        if not found:
            raise ImportError("trim-plugin is not installed here, only imported. Install it: pip install -e .")
        return next(iter(found)).load()(
            rows,
            model_of(arguments.model),
            weights=weights_of(arguments),
            adapter=arguments.adapter,
            device=arguments.device,
            config=way.config,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            folder=arguments.questions.parent.resolve(),
            actors=arguments.actors,
        )


def _pictures(row: dict[str, Any]) -> int:
    images = row.get("images")
    return len(images) if isinstance(images, list) else 0


def _sum_up(
    console: Console, file: Path, rows: Sequence[dict[str, Any]], results: Results, done: int, errors: Rows
) -> None:
    failed = sum(row["id"] in results.failed for row in rows)
    before = f", {done} of them before" if done else ""
    console.print(f"{len(rows)} rows have a result{before}; {failed} are errors: {file}", highlight=False, markup=False)
    for result in errors[:SHOWN_ERRORS]:
        console.print(f"{result['id']}: {result['error']}", style="red", highlight=False, markup=False)
    if len(errors) > SHOWN_ERRORS:
        console.print(f"and {len(errors) - SHOWN_ERRORS} more", style="red", highlight=False)
