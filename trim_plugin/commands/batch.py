"""`trim-plugin batch`: answer a file of rows, however many, however often interrupted."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import TextColumn

from trim_plugin.asking.results import Results
from trim_plugin.asking.rows import Row, read_rows
from trim_plugin.commands import FAILED_ROWS, UserError, common, loading, plain_console, user_errors
from trim_plugin.variants import Variant

if TYPE_CHECKING:
    from rich.console import Console

Answers = list[dict[str, Any]]
#: Errors that are shown at the end; all of them stand in the file.
SHOWN_ERRORS = 3


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = common.add_command(subparsers, "batch", run, [common.generation_options()])
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
    common.add_engine_options(parser, "rows that are answered at once", "rows that are being answered")
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
        choices=("local", "ray"),
        default="local",
        help="this process, with its share under a launcher, or a Ray cluster (default: %(default)s)",
    )
    common.add_count(parser, "--actors", "workers of --engine ray (default: one for every GPU, or 1)")


def run(arguments: argparse.Namespace) -> None:
    """Answer the rows of this process that have no result in `--out` yet."""
    console = plain_console(stderr=True)
    rule, memory = common.one_rule(arguments), common.memory_of(arguments)
    process, processes = loading.process_of(os.environ)
    with user_errors(OSError, ValueError):
        common.check_folder_of(arguments.out)
        rows = read_rows(arguments.questions)
        if arguments.out.exists() and arguments.out.samefile(arguments.questions):  # perhaps by another name
            raise UserError(f"--out {arguments.out} is the file of questions; results need a file of their own")
    if arguments.engine == "ray" and arguments.pictures_cache is not None:
        raise UserError("--pictures-cache goes with --engine local")
    if arguments.engine == "ray":
        common.needs("--engine ray", "ray", "'ray[data,serve]'", "accelerate")
    else:  # a cluster's folders and devices are not this machine's
        if arguments.pictures_cache is not None:
            _make_folder(arguments.pictures_cache)
        loading.begin_loading(arguments)
        loading.check_device(loading.device_of(arguments.device, os.environ))
    share = rows[process::processes]
    with user_errors(OSError, ValueError):
        results = Results(arguments.out, loading.settings_of(arguments) | {"rule": rule.name}, rows)
        if arguments.retry_errors:
            results.forget_errors({row.id for row in share})
        missing = [row for row in share if not results.has(row.id)]
        results.add({"id": row.id, "error": row.error} for row in missing if row.error)
    if results.set_aside:
        what = "results are of rows that are not in the file any more, or have changed"
        console.print(f"{results.set_aside} {what}: {results.aside}", soft_wrap=True)
    before = len(share) - len(missing)
    missing = [row for row in missing if not row.error]
    if missing:
        answered = _answered_by_ray if arguments.engine == "ray" else _answered_here
        with common.progress(console, process, TextColumn("{task.fields[speed]}")) as bar:
            task = bar.add_task("rows", total=len(share), completed=len(share) - len(missing), speed="")
            pictures = {row.id: len(row.images) for row in missing}
            seen = 0
            for batch in answered(arguments, rule, missing, memory):
                with user_errors(OSError, ValueError):
                    results.add(batch)
                seen += sum(pictures[result["id"]] for result in batch)
                elapsed = bar.tasks[task].elapsed or 0.0
                speed = f"{seen / elapsed:.3g} pictures/s" if elapsed else ""
                bar.update(task, advance=len(batch), speed=speed)
    _sum_up(console, arguments.out, rows, share, results, before)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--pictures-cache {folder}: cannot make this folder ({error.strerror})") from None


def _answered_here(
    arguments: argparse.Namespace, rule: Variant, rows: list[Row], memory: int | None
) -> Iterator[Answers]:
    from trim_plugin.batching.worker import Worker

    model, processor = loading.load_model(arguments)
    with user_errors(OSError, ValueError):
        worker = Worker(
            model,
            processor,
            rule.config,
            max_running=arguments.max_running,
            memory=memory,
            max_new_tokens=arguments.max_new_tokens,
            folder=arguments.questions.parent,
            picture_folder=arguments.pictures_cache,
        )
    # A picture that cannot be written to its folder is no row's fault.
    with contextlib.closing(worker), user_errors(OSError):
        for batch in worker.answers(rows):
            yield [result for _, result in batch]


def _answered_by_ray(
    arguments: argparse.Namespace, rule: Variant, rows: list[Row], memory: int | None
) -> Iterator[Answers]:
    """The installed engine's results; integrations know the package, not the other way round, so it is found by its name."""
    with user_errors(ImportError):
        return loading.plugged_in("trim_plugin.engines", arguments.engine)(
            rows,
            loading.model_of(arguments.model),
            weights=loading.weights_of(arguments),
            adapter=arguments.adapter,
            device=arguments.device,
            config=rule.config,
            max_running=arguments.max_running,
            memory=memory,
            max_new_tokens=arguments.max_new_tokens,
            folder=arguments.questions.parent.resolve(),
            actors=arguments.actors,
        )


def _sum_up(
    console: Console, file: Path, rows: Sequence[Row], share: Sequence[Row], results: Results, before: int
) -> None:
    """Say what there is now.

    Raises:
        UserError: all rows have a result, and some are errors. Of several processes the last one says it, since launchers end the
            others when one fails.
    """
    with user_errors(OSError, ValueError):
        found = {result["id"]: result for result in results.read()}
    ended = [found[row.id] for row in share if row.id in found]
    failed = [result for result in ended if "error" in result]
    earlier = f", {before} of them before" if before else ""
    say = functools.partial(console.print, soft_wrap=True)
    say(f"{len(ended)} rows have a result{earlier}; {len(failed)} are errors: {file}")
    for result in failed[:SHOWN_ERRORS]:
        say(f"{result['id']}: {result['error']}", style="red")
    if len(failed) > SHOWN_ERRORS:
        say(f"and {len(failed) - SHOWN_ERRORS} more", style="red")
    in_all = sum("error" in found[row.id] for row in rows if row.id in found)
    if in_all and all(row.id in found for row in rows):
        raise UserError(
            f"{in_all} of {len(rows)} rows are errors. Mend what they say, then give the same command and --retry-errors",
            FAILED_ROWS,
        )
