"""The subcommands of `trim-plugin`, a module each: `add_parser(subparsers)` and `run(arguments) -> None`.

`run` raises `UserError` for whatever the user can mend: an option, a file, the model. A subcommand is one line here and its
module, which is imported when it is asked for: `trim-plugin --help` loads no model code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from trim_plugin.asking import first_line as first_line

if TYPE_CHECKING:
    from rich.console import Console

#: Module of every subcommand, and what `trim-plugin --help` says of it.
COMMANDS = {
    "demo": "answer questions about pictures, stock beside trimmed",
    "generate": "answer a prompt about pictures, then report what the cache held",
    "batch": "answer a file of many pictures and questions, however often it is interrupted",
    "serve": "an OpenAI-compatible server for one user or a small team",
    "encode": "run pictures through the vision tower once, for `generate --pictures` to ask about",
    "eval": "compare stock and trimmed answers on your own pictures and questions",
    "plan": "memory that a generation will take, stock beside trimmed",
}

#: What an interrupted subcommand has left, where that is of use.
AFTER_INTERRUPTION = dict.fromkeys(("batch", "eval"), "the same command goes on where it stopped")


#: Exit statuses: a mistake in the call; and a run that went through, but whose rows are not all answered (`batch`), or whose
#: comparison lacks a whole variant (`eval`).
MISTAKE, FAILED_ROWS = 2, 1


class UserError(Exception):
    """Something the user can mend: shown as one line on stderr, without a traceback; the program exits with `status`."""

    def __init__(self, message: str, status: int = MISTAKE) -> None:
        super().__init__(message)
        self.status = status


def plain_console(*, stderr: bool = False) -> Console:
    """Where a subcommand prints. Words are shown as they are: a file may be called "[red]", a question may hold ":warning:"."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


@contextlib.contextmanager
def user_errors(*kinds: type[Exception], before: str = "") -> Iterator[None]:
    """Show errors of these kinds as the user's, by their first line, with some words before it."""
    try:
        yield
    except kinds as error:
        raise UserError(before + first_line(error)) from None
