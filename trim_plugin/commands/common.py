"""What several subcommands share: options of one name and one meaning, and checks whose errors a user can act on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from trim_plugin.cache.quantized import require_bitsandbytes
from trim_plugin.commands import UserError
from trim_plugin.config import DEFAULT_TOP_K_RATIO
from trim_plugin.evaluation import Way, ways_for
from trim_plugin.kv_formats import KV_FORMATS
from trim_plugin.pictures.prompting import open_picture
from trim_plugin.rules.processors import share

#: The name of the model that ships with the package.
SMALL = "small"
#: As in `trim_plugin.integrations.accelerate.WEIGHTS`, which is not imported before it is needed.
WEIGHTS = ("bf16", "fp32", "fp16", "int8", "nf4", "fp4")
#: `--device` values that spread a model over all devices there are.
SPREAD = ("auto", "balanced", "sequential")
MAX_NEW_TOKENS = 128


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


def add_model_word(parser: argparse.ArgumentParser) -> None:
    """Let the model be the first word too; `read_model_word` makes it `--model`."""
    parser.add_argument("first", metavar="MODEL", nargs="?", help="the same as --model")


def read_model_word(arguments: argparse.Namespace) -> None:
    """Put the model that is given as a word where `--model` is, or raise `UserError` if both are given."""
    if arguments.first is not None:
        if arguments.model is not None:
            raise UserError(f"the model is given twice: {arguments.first} and --model {arguments.model}")
        arguments.model = arguments.first


def add_rule_options(parser: argparse.ArgumentParser, default: str, *, several: bool) -> None:
    """Add the rules, to be read by `ways`, and what goes with every rule.

    Args:
        parser: the subcommand's.
        default: what `--top-k-ratio` is if no rule is given.
        several: whether the subcommand compares rules, so that each may be given more than once.
    """
    again = "may be given again; " if several else ""
    parser.add_argument(
        "--top-k-ratio",
        action="append",
        metavar="RATIO",
        help="the paper's rule: share of the visual tokens that each head keeps; 1 is exact mode, which keeps all that "
        f"can be read ({again}default: {default})",
    )
    parser.add_argument(
        "--kept-share",
        action="append",
        metavar="SHARE",
        help=f"KCenter: keep this share, chosen to cover the picture ({again}default: not used)",
    )
    parser.add_argument(
        "--radius",
        action="append",
        metavar="DISTANCE",
        help="KCenter: keep as many as it takes for no token to be farther than this cosine distance from a kept one "
        f"({again}default: not used)",
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
        try:
            require_bitsandbytes(f"--kv-quantization {arguments.kv_quantization}")
        except ImportError as error:
            raise UserError(str(error)) from None


def ways(arguments: argparse.Namespace, default_ratios: Sequence[str], *, stock: bool) -> list[Way]:
    """The ways to generate that the rule options ask for.

    Args:
        arguments: parsed, of a parser that has the options of `add_rule_options`.
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
    try:
        return open_picture(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None


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
