"""`trim-plugin encode`: run pictures through the vision tower once and write what it yields, whole or compacted."""

from __future__ import annotations

import argparse
import functools
import operator
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from trim_plugin.arithmetic import format_bytes
from trim_plugin.commands import UserError, common, loading, plain_console, user_errors

if TYPE_CHECKING:
    from trim_plugin.pictures.encoded import Pictures


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = common.add_command(subparsers, "encode", run, [common.model_options()])
    common.add_image_option(
        parser,
        "pictures, for instance a document's pages, in the order in which prompts are to read them",
        required=True,
    )
    common.add_picture_options(
        parser,
        share_help="keep this share of every picture's tokens and merge the rest into it (default: keep everything, "
        "with the same answers as without encoding)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="where the encoded pictures go (.safetensors)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Check the options, load, encode picture by picture, write the file."""
    given = {name: getattr(arguments, name) for name in ("kept_share", "radius")}
    covering = {name: value for name, value in given.items() if value is not None}
    if len(covering) > 1:
        raise UserError("--kept-share and --radius are both given. Choose one")
    common.check_folder_of(arguments.out)
    images = common.pictures_of(arguments.image)
    loading.begin_loading(arguments)
    from trim_plugin.pictures.encoding import encode_pictures
    from trim_plugin.selection.k_center import KCenter

    rule = KCenter(**covering) if covering else None
    model, processor = loading.load_model(arguments)
    console, shown, pages, start = plain_console(), plain_console(stderr=True), [], time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Elsewhere than on a terminal a bar that goes away again would leave an empty line.
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as progress:
        task = progress.add_task("encoding", total=len(images))
        for name, image in zip(arguments.image, images, strict=True):
            began = time.perf_counter()
            page = encode_pictures(model, processor, [image], rule, tower_share=arguments.tower_share)
            console.print(_line(Path(name).name, page, time.perf_counter() - began))
            pages.append(page)
            progress.advance(task)
    pictures = functools.reduce(operator.add, pages)
    seconds = time.perf_counter() - start
    with user_errors(OSError, before=f"cannot write {arguments.out}: "):
        pictures.save(arguments.out)
    size = format_bytes(arguments.out.stat().st_size)
    count = "1 picture" if len(pages) == 1 else f"{len(pages)} pictures"
    console.print(f"{arguments.out}: {size}, {_line(count, pictures, seconds)}")


def _line(name: str, pictures: Pictures, seconds: float) -> str:
    """Tiles, tokens and time of what was encoded."""
    tiles, kept, real = sum(pictures.tiles), len(pictures.index), sum(pictures.tiles) * pictures.tile_tokens
    of_all = f"all {kept} visual tokens" if pictures.rule == "whole" else f"{kept} of {real} visual tokens"
    return f"{name}: {tiles} {'tile' if tiles == 1 else 'tiles'}, {of_all}, {seconds:.3g} s"
