"""The subcommands of `trim-plugin`, a module each: `add_parser(subparsers)` and `run(arguments) -> None`."""


class UserError(Exception):
    """Something the user can mend: shown as one line on stderr, exit status 2, no traceback."""
