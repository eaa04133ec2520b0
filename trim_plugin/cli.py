"""The command `trim-plugin`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from trim_plugin.commands import COMMANDS, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0, or 2 for what the user can mend)."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="trim-plugin", description="Llama-3.2-Vision with a trimmed cross-attention cache."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Only the subcommand that is meant is imported: they load torch.
    meant = next((word for word in words if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        if name == meant:
            importlib.import_module(f"trim_plugin.commands.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    arguments = parser.parse_args(words)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"trim-plugin {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
