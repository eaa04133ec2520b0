"""`trim-plugin serve`: transformers' own OpenAI-compatible server, with the trimmed cache, safe by default."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from trim_plugin.commands import UserError
from trim_plugin.commands.common import (
    add_command,
    add_generation_options,
    check_counts,
    first_line,
    one_way,
    user_errors,
)
from trim_plugin.commands.loading import load_model, name_of
from trim_plugin.config import TrimConfig
from trim_plugin.serving.gate import LOCAL_NAMES
from trim_plugin.serving.limits import Limits

LIMITS = Limits()
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = add_command(subparsers, "serve", run, model_word=True)
    parser.add_argument(
        "--host",
        default="localhost",
        help="address to listen on; there is no password, so others than localhost are for networks that you trust "
        "(default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    _add_limits(parser)
    parser.add_argument("--enable-cors", action="store_true", help="let web pages of any site ask (default: none may)")
    parser.add_argument("--default-seed", type=int, metavar="N", help="seed for sampling (default: none)")
    parser.add_argument(
        "--log-level", choices=LOG_LEVELS, default="warning", help="what the server says (default: %(default)s)"
    )
    add_generation_options(parser, length=False)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the bounds on a request."""
    bounds = (
        ("--max-pictures", LIMITS.pictures, "most pictures of a request"),
        ("--max-pixels", LIMITS.pixels, "most pixels of a picture"),
        ("--max-tokens", LIMITS.tokens, "most text tokens of a request, prompt and answer together"),
        ("--max-bytes", LIMITS.body_bytes, "most bytes of a request"),
        ("--max-waiting", LIMITS.waiting, "most requests that are answered or wait at a time"),
    )
    for option, default, what in bounds:
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--allow-folder",
        type=Path,
        metavar="FOLDER",
        help="let requests name picture files in it (default: pictures come inside requests, as data: addresses)",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        metavar="HOST",
        help="let requests name pictures at this host, which the server fetches; may be given again (default: none)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Load the model and answer requests until interrupted.

    Raises:
        UserError: an option is wrong, the model cannot be loaded, or a package is missing.
    """
    config = one_way(arguments).config or TrimConfig()
    check_counts(arguments, "port", "max_pictures", "max_pixels", "max_tokens", "max_bytes", "max_waiting")
    if arguments.allow_folder is not None and not arguments.allow_folder.is_dir():
        raise UserError(f"--allow-folder: no such folder: {arguments.allow_folder}")
    try:
        import uvicorn
        from starlette.middleware.cors import CORSMiddleware
        from transformers.cli.serving.utils import set_torch_seed
    except ImportError as error:
        raise UserError(f"{first_line(error)}. Install what a server needs: pip install 'trim-plugin[serve]'") from None
    model, processor = load_model(arguments)
    name = name_of(arguments)
    app: Any = _app(arguments, model, processor, name, config)
    if arguments.enable_cors:
        app = CORSMiddleware(app, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    if arguments.default_seed is not None:
        set_torch_seed(arguments.default_seed)
    _set_log_level(arguments.log_level)
    Console(stderr=True).print(
        f"{name} answers at http://{arguments.host}:{arguments.port}/v1, one request at a time. Ctrl-C ends it.",
        highlight=False,
        markup=False,
    )
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level=arguments.log_level)


def _app(arguments: argparse.Namespace, model: Any, processor: Any, name: str, config: TrimConfig) -> Any:
    from trim_plugin.serving.app import build_app

    limits = Limits(
        pictures=arguments.max_pictures,
        pixels=arguments.max_pixels,
        tokens=arguments.max_tokens,
        body_bytes=arguments.max_bytes,
        waiting=arguments.max_waiting,
        folder=arguments.allow_folder,
        hosts=frozenset(arguments.allow_host or ()),
    )
    with user_errors(ImportError, ValueError):
        return build_app(model, processor, name, config, limits, local=arguments.host in LOCAL_NAMES)


def _set_log_level(level: str) -> None:
    """transformers' server warns of every request that it receives; that is news at level info."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.get_logger("transformers").setLevel(transformers_logging.log_levels[level])
    if level == "warning":
        logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)
