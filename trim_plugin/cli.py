"""The command `trim-plugin`."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from trim_plugin.commands import AFTER_INTERRUPTION, COMMANDS, UserError

#: Exit statuses, as shells use them: an interruption, a reader that went away.
INTERRUPTED, BROKEN_PIPE = 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a mistake in the call, 1 if rows failed, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    # The first word without a dash: options of the program itself take no values.
    name = next((word for word in words if not word.startswith("-")), "")
    own_name = f"trim-plugin {name}" if name in COMMANDS else "trim-plugin"
    say = functools.partial(print, f"{own_name}:", file=sys.stderr)
    try:
        arguments = _parser(name).parse_args(words)
        with _warnings_in_one_line(say):
            arguments.run(arguments)
    except UserError as error:
        say(error)
        return error.status
    except KeyboardInterrupt:
        _let_a_second_interruption_end_at_once()
        say("; ".join(filter(None, ["interrupted", AFTER_INTERRUPTION.get(name)])))
        return INTERRUPTED
    except BrokenPipeError:
        # `trim-plugin ... | head`: nobody reads any more. The interpreter would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return 0


class _Parser(argparse.ArgumentParser):
    """One line for a wrong option, as for everything else that the user can mend."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help shows what there is)")


def _parser(name: str) -> argparse.ArgumentParser:
    parser = _Parser(prog="trim-plugin", description="Llama-3.2-Vision with a trimmed cross-attention cache.")
    parser.add_argument("--version", action="version", version=_versions())
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Only the subcommand that is meant is imported: they load torch.
    for command, summary in COMMANDS.items():
        if command == name:
            importlib.import_module(f"trim_plugin.commands.{command}").add_parser(subparsers)
        else:
            subparsers.add_parser(command, help=summary)
    return parser


def _versions() -> str:
    from trim_plugin import __version__

    others = (f"{package} {importlib.metadata.version(package)}" for package in ("transformers", "torch"))
    return f"trim-plugin {__version__} ({', '.join(others)})"


@contextlib.contextmanager
def _warnings_in_one_line(say: functools.partial[None]) -> Iterator[None]:
    """Show warnings without the source line, and none of those that libraries mean for each other."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say(str(message).splitlines()[0])

    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category)
        warnings.showwarning = show
        yield


def _let_a_second_interruption_end_at_once() -> None:
    """Threads of libraries may take a while to end; an impatient second Ctrl-C shall not show where they were."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
