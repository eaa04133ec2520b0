"""`trim-plugin serve`: an OpenAI-compatible server that answers many at once, safe by default."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from trim_plugin.commands import UserError, common, loading, plain_console, user_errors
from trim_plugin.serving.limits import Limits

LIMITS = Limits()
#: What a server needs.
PACKAGES = ("starlette", "uvicorn", "openai", "prometheus_client")
#: Where the API key may stand instead of the command line, which other users of the machine can read.
API_KEY = "TRIM_PLUGIN_API_KEY"
#: How long answers may take to end when the server is told to.
DRAIN_SECONDS = 30


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = common.add_command(subparsers, "serve", run, [common.generation_options(length=False)])
    parser.add_argument(
        "--host",
        default="localhost",
        help="address to listen on; without --api-key others than localhost are for networks that you trust "
        "(default: %(default)s)",
    )
    common.add_count(parser, "--port", "port to listen on (default: %(default)s)", metavar="PORT", default=8000)
    _add_limits(parser)
    parser.add_argument("--enable-cors", action="store_true", help="let web pages of any site ask (default: none may)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"what requests have to bring as a bearer token (default: ${API_KEY} if it is set, else none)",
    )
    common.add_engine_options(parser, "requests that run at once", "running requests")
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error", "critical"),
        default="warning",
        help="what the server says (default: %(default)s)",
    )


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
        common.add_count(parser, option, f"{what} (default: %(default)s)", default=default)
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
    """Load the model and answer requests until interrupted."""
    rule, memory = common.one_rule(arguments), common.memory_of(arguments)
    if arguments.allow_folder is not None and not arguments.allow_folder.is_dir():
        raise UserError(f"--allow-folder: no such folder: {arguments.allow_folder}")
    if arguments.api_key == "":
        raise UserError("--api-key is empty: leave it out to let everybody ask")
    if arguments.port > 65535:
        raise UserError(f"--port: {arguments.port} is no port; they end at 65535")
    for module in PACKAGES:
        common.needs("serve", module, *PACKAGES)
    loading.begin_loading(arguments)
    import uvicorn

    from trim_plugin.engine.engine import Engine
    from trim_plugin.serving.app import LOCAL_NAMES, build_app
    from trim_plugin.serving.listening import Listener

    model, processor = loading.load_model(arguments)
    name = loading.name_of(arguments)
    with user_errors(ImportError, ValueError):
        engine = Engine(model, processor, rule.config, memory=memory, max_running=arguments.max_running)
        try:
            app = build_app(
                engine,
                processor,
                name,
                _limits(arguments).for_model(model),
                local=arguments.host.lower() in LOCAL_NAMES,
                api_key=arguments.api_key or os.environ.get(API_KEY) or None,
                cors=arguments.enable_cors,
            )
        except ValueError:
            engine.close(cancel=True)
            raise

    def announce() -> None:
        plain_console(stderr=True).print(
            f"{name} answers at http://{arguments.host}:{arguments.port}/v1, {arguments.max_running} requests at once. "
            "Ctrl-C ends it."
        )

    settings = {"host": arguments.host, "port": arguments.port, "log_level": arguments.log_level}
    Listener(uvicorn.Config(app, timeout_graceful_shutdown=DRAIN_SECONDS, **settings), announce).run()


def _limits(arguments: argparse.Namespace) -> Limits:
    return Limits(
        pictures=arguments.max_pictures,
        pixels=arguments.max_pixels,
        tokens=arguments.max_tokens,
        body_bytes=arguments.max_bytes,
        waiting=arguments.max_waiting,
        folder=arguments.allow_folder,
        hosts=frozenset(arguments.allow_host or ()),
    )
