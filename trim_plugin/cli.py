"""The command `trim-plugin`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from trim_plugin.commands import UserError, demo, generate, plan
from trim_plugin.commands import eval as evaluation

COMMANDS = (demo, generate, evaluation, plan)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0, or 2 for what the user can mend)."""
    parser = argparse.ArgumentParser(
        prog="trim-plugin", description="Llama-3.2-Vision with a trimmed cross-attention cache."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"trim-plugin {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
