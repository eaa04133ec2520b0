"""What several subcommands share: options of one name and one meaning, and checks whose errors a user can act on."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from trim_plugin.cache.blocks import require_bitsandbytes
from trim_plugin.commands import COMMANDS, UserError
from trim_plugin.config import DEFAULT_TOP_K_RATIO
from trim_plugin.evaluation import Way, ways_for
from trim_plugin.kv_formats import KV_FORMATS
from trim_plugin.pictures.prompting import open_picture
from trim_plugin.selection.processors import share

#: The name of the model that ships with the package.
SMALL = "small"
#: As in `trim_plugin.integrations.accelerate.WEIGHTS`, which is not imported before it is needed.
WEIGHTS = ("bf16", "fp32", "fp16", "int8", "nf4", "fp4")
#: `--device` values that spread a model over all devices there are.
SPREAD = ("auto", "balanced", "sequential")
MAX_NEW_TOKENS = 128


def add_command(
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], None], *, model_word: bool = False
) -> argparse.ArgumentParser:
    """Add a subcommand.

    Args:
        subparsers: those of the program.
        name: one of `COMMANDS`, which says what it does.
        run: its work; raises `UserError` for what the user can mend.
        model_word: whether the first word may be the model, as `--model` is.

    Returns:
        Its parser, for options.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=COMMANDS[name], description=COMMANDS[name])
    parser.set_defaults(run=run)
    if model_word:
        parser.add_argument("first", metavar="MODEL", nargs="?", help="the same as --model")
        parser.set_defaults(run=lambda arguments: run(_with_model_word(arguments)))
    return parser


def _with_model_word(arguments: argparse.Namespace) -> argparse.Namespace:
    """Put the model that is given as a word where `--model` is, or raise `UserError` if both are given."""
    if arguments.first is not None:
        if arguments.model is not None:
            raise UserError(f"the model is given twice: {arguments.first} and --model {arguments.model}")
        arguments.model = arguments.first
    return arguments


def add_generation_options(
    parser: argparse.ArgumentParser,
    default: str = str(DEFAULT_TOP_K_RATIO),
    *,
    several: bool = False,
    length: bool = True,
) -> None:
    """Add what every subcommand that generates takes: the model, the rules and the length of answers.

    Args:
        parser: the subcommand's.
        default: what `--top-k-ratio` is if no rule is given.
        several: whether the subcommand compares rules, so that each may be given more than once.
        length: whether it says how long answers may be; a server's requests do.
    """
    add_model_options(parser)
    _add_rule_options(parser, default, "may be given again; " if several else "")
    if length:
        add_length_option(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what loads a model, to be read by `loading.load_model`."""
    parser.add_argument(
        "--model", help="model folder or hub id; 'small' is the model that ships with the package (default: small)"
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="dtype, or quantization by bitsandbytes (default: fp32 for the small model, bf16 for others)",
    )
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="a LoRA adapter in safetensors (default: none)")
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, …, or auto, balanced, sequential to spread the model over what there is; under a "
        "launcher every process takes a GPU of its own (default: %(default)s)",
    )
    parser.add_argument(
        "--max-memory",
        action="append",
        metavar="DEVICE=SIZE",
        help="what a device may hold, for instance 0=20GiB or cpu=60GiB; may be given again (default: all of it)",
    )
    parser.add_argument(
        "--offload-folder", type=Path, metavar="FOLDER", help="where weights go that fit nowhere else (default: none)"
    )


def _add_rule_options(parser: argparse.ArgumentParser, default: str, again: str) -> None:
    """Add the rules and what goes with every rule, to be read by `ways` and `one_way`."""
    parser.add_argument(
        "--top-k-ratio",
        action="append",
        metavar="RATIO",
        help="the paper's rule: share of the visual tokens that each head keeps; 1 is exact mode, which keeps all that "
        f"can be read ({again}default: {default})",
    )
    add_picture_options(
        parser,
        action="append",
        share_help=f"keep this share, chosen to cover the picture ({again}default: not used)",
        again=again,
    )
    parser.add_argument(
        "--no-merge",
        action="store_true",
        help="forget what the rule drops, as in the paper (default: merge it into what is kept)",
    )
    parser.add_argument(
        "--kv-quantization",
        choices=tuple(KV_FORMATS),
        help="hold the kept tokens in 8 or 4 bits (default: in the model's dtype)",
    )


def add_picture_options(
    parser: argparse.ArgumentParser, *, share_help: str, action: str = "store", again: str = ""
) -> None:
    """Add what can be done with a picture before any prompt is known: `encode` has it too."""
    parser.add_argument("--kept-share", action=action, metavar="SHARE", help=f"KCenter: {share_help}")
    parser.add_argument(
        "--radius",
        action=action,
        metavar="DISTANCE",
        help="KCenter: keep as many as it takes for no token to be farther than this cosine distance from a kept one "
        f"({again}default: not used)",
    )
    add_tower_option(parser)


def add_tower_option(parser: argparse.ArgumentParser) -> None:
    """Add `--tower-share`."""
    parser.add_argument(
        "--tower-share",
        metavar="SHARE",
        help="share of the patches that go on through the vision tower, the others being merged into them: faster, not exact "
        "(default: the tower is untouched)",
    )


def tower_share(arguments: argparse.Namespace) -> float | None:
    """`--tower-share`, or `UserError`."""
    return None if arguments.tower_share is None else check_ratio(arguments.tower_share, "--tower-share")


def add_length_option(parser: argparse.ArgumentParser) -> None:
    """Add `--max-new-tokens`."""
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="longest answer, in text tokens (default: %(default)s)",
    )


def _check_kv_quantization(arguments: argparse.Namespace) -> None:
    """Raise `UserError` if `--kv-quantization` needs a package that is not installed."""
    if arguments.kv_quantization is not None:
        with user_errors(ImportError):
            require_bitsandbytes(f"--kv-quantization {arguments.kv_quantization}")


def ways(arguments: argparse.Namespace, default_ratios: Sequence[str], *, stock: bool) -> list[Way]:
    """The ways to generate that the rule options ask for.

    Args:
        arguments: parsed, of a parser that has the options of `add_generation_options`.
        default_ratios: what `--top-k-ratio` is if no rule is given.
        stock: whether transformers' own cache comes first.

    Raises:
        UserError: a value is not allowed or given twice, or a package is missing.
    """
    _check_kv_quantization(arguments)
    given = {name: getattr(arguments, name) or [] for name in ("top_k_ratio", "kept_share", "radius")}
    if not any(given.values()):
        given["top_k_ratio"] = list(default_ratios)
    values = {name: [check_ratio(text, option_of(name)) for text in texts] for name, texts in given.items()}
    for name, numbers in values.items():
        if len(set(numbers)) < len(numbers):
            raise UserError(f"{option_of(name)}: the same value is given twice")
    return ways_for(
        values["top_k_ratio"],
        arguments.kv_quantization,
        shares=values["kept_share"],
        radii=values["radius"],
        merge=not arguments.no_merge,
        tower_share=tower_share(arguments),
        stock=stock,
    )


def one_way(arguments: argparse.Namespace, default_ratio: float = DEFAULT_TOP_K_RATIO) -> Way:
    """The one trimmed cache that the rule options ask for, a `top_k_ratio` if they don't say.

    Raises:
        UserError: several rules are given, a value is not allowed, or a package is missing.
    """
    chosen = ways(arguments, [str(default_ratio)], stock=False)
    if len(chosen) > 1:
        raise UserError(
            f"several rules are given: {', '.join(way.name for way in chosen)}. Choose one; eval and demo compare them"
        )
    return chosen[0]


def picture_or_error(path: Path) -> Image.Image:
    """Open a picture as RGB, or raise `UserError`."""
    with user_errors(FileNotFoundError, ValueError):
        return open_picture(path)


def check_ratio(text: str, option: str = "--top-k-ratio") -> float:
    """A share given as an option, or `UserError`."""
    try:
        return share(option, float(text))
    except ValueError:
        raise UserError(f"{option} must be a number in (0, 1], got {text}") from None


def check_counts(arguments: argparse.Namespace, *names: str) -> None:
    """Raise `UserError` unless these arguments, where given, are at least 1."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"{option_of(name)} must be at least 1, got {value}")


def check_folder_of(out: Path) -> None:
    """Raise `UserError` unless the folder that `--out` is to be written in exists."""
    folder = out.resolve().parent
    if not folder.is_dir():
        raise UserError(f"--out: no such folder: {folder}")


def check_is_not(out: Path, read: Path, option: str) -> None:
    """Raise `UserError` if what is to be written is a file that is read, perhaps by another name."""
    if out.exists() and read.exists() and out.samefile(read):
        raise UserError(f"{option} {out} is the file of questions; results need a file of their own")


def option_of(name: str) -> str:
    """An argument's name as the user writes it.

    Example:
        >>> option_of("max_new_tokens")
        '--max-new-tokens'
    """
    return "--" + name.replace("_", "-")


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Show errors of these kinds as the user's, by their first line."""
    try:
        yield
    except kinds as error:
        raise UserError(first_line(error)) from None


def progress(console: Console, process: int, *columns: ProgressColumn) -> Progress:
    """A bar over many answers, with columns of one's own before the time that is left; the first process alone shows it."""
    before = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*before, *columns, TimeRemainingColumn(), console=console, disable=process > 0)
