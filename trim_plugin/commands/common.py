"""What several subcommands share: options of one name and one meaning, and checks whose errors a user can act on."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trim_plugin.arithmetic import parse_bytes, share, taken_for
from trim_plugin.commands import COMMANDS, UserError, user_errors
from trim_plugin.config import DEFAULT_KEPT_SHARE
from trim_plugin.durable import open_regular
from trim_plugin.kv_formats import KV_FORMATS, require_bitsandbytes
from trim_plugin.planning.model_sizes import WEIGHT_FORMATS
from trim_plugin.variants import Variant, variants_for

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

#: The name of the model that ships with the package.
SMALL = "small"
#: `--device` values that spread a model over all devices there are.
SPREAD = ("auto", "balanced", "sequential")
#: As `engine.engine.MAX_RUNNING`, without loading what that needs.
MAX_RUNNING = 32


class _Model(argparse.Action):
    """The model, as the first word or as `--model`: once."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, _: Any = None
    ) -> None:
        """Take it, unless there is none or one already."""
        if value is None:
            return
        before = getattr(namespace, self.dest, None)
        if before is not None:
            parser.error(f"the model is given twice: {before} and {value}")
        setattr(namespace, self.dest, value)


def add_command(
    subparsers: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    parents: Sequence[argparse.ArgumentParser] = (),
) -> argparse.ArgumentParser:
    """Add a subcommand of `COMMANDS`; `run` raises `UserError` for what the user can mend, `parents` hold shared options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=COMMANDS[name], description=COMMANDS[name], parents=list(parents), allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def model_options() -> argparse.ArgumentParser:
    """The parent of every subcommand that loads a model; `loading` reads it."""
    parent = argparse.ArgumentParser(add_help=False)
    add_model(parent, f"a folder or hub id; '{SMALL}' is the model that ships with the package (default: {SMALL})")
    parent.add_argument(
        "--weights",
        choices=WEIGHT_FORMATS,
        help="dtype, or quantization by bitsandbytes (default: fp32 for the small model, bf16 for others)",
    )
    parent.add_argument("--adapter", type=Path, metavar="FOLDER", help="a LoRA adapter in safetensors (default: none)")
    parent.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, …, or auto, balanced, sequential to spread the model over what there is; under a "
        "launcher every process takes a GPU of its own (default: %(default)s)",
    )
    parent.add_argument(
        "--max-memory",
        action="append",
        metavar="DEVICE=SIZE",
        help="what a device may hold, for instance 0=20GiB or cpu=60GiB; may be given again (default: all of it)",
    )
    parent.add_argument(
        "--offload-folder", type=Path, metavar="FOLDER", help="where weights go that fit nowhere else (default: none)"
    )
    return parent


def add_model(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the model, which is the first word of every subcommand, or `--model`."""
    parser.add_argument("model", metavar="MODEL", nargs="?", action=_Model, help=what)
    parser.add_argument("--model", action=_Model, help="the same as MODEL (default: as there)")


def generation_options(
    *, ratios: str = "not used", shares: str = str(DEFAULT_KEPT_SHARE), several: bool = False, length: bool = True
) -> argparse.ArgumentParser:
    """The parent of every subcommand that generates: the model, the rules and the length of answers.

    Args:
        ratios, shares: what `--top-k-ratio` and `--kept-share` are if no rule is given, in the help's words.
        several: whether the subcommand compares rules, so that each may be given more than once.
        length: whether it says how long answers may be; a server's requests do.
    """
    parent = argparse.ArgumentParser(add_help=False, parents=[model_options()])
    again = "may be given again; " if several else ""
    what = f"the paper's rule: share that each head keeps; 1 is exact mode ({again}default: {ratios})"
    add_share(parent, "--top-k-ratio", what, metavar="RATIO", action="append")
    add_picture_options(
        parent,
        action="append",
        share_help=f"keep this share, chosen to cover the picture ({again}default: {shares}, if no rule is given)",
        again=again,
    )
    parent.add_argument(
        "--no-merge",
        action="store_true",
        help="forget what the rule drops, as in the paper (default: merge it into what is kept)",
    )
    parent.add_argument(
        "--kv-quantization",
        choices=tuple(KV_FORMATS),
        help="hold the kept tokens in 8 or 4 bits (default: in the model's dtype)",
    )
    if length:
        add_length_option(parent)
    return parent


def add_image_option(parser: Any, what: str, *, required: bool = False) -> None:
    """Add `--image`: one or several pictures, and again."""
    parser.add_argument("--image", action="extend", nargs="+", default=[], required=required, metavar="FILE", help=what)


def add_picture_options(
    parser: argparse.ArgumentParser, *, share_help: str, action: str = "store", again: str = ""
) -> None:
    """Add what can be done with a picture before any prompt is known: `encode` has it too."""
    add_share(parser, "--kept-share", f"KCenter: {share_help}", action=action)
    what = "KCenter: keep as many as it takes for no token to be farther than this cosine distance from a kept one"
    add_share(parser, "--radius", f"{what} ({again}default: not used)", metavar="DISTANCE", action=action)
    add_tower_option(parser)


def add_tower_option(parser: argparse.ArgumentParser) -> None:
    """Add `--tower-share`."""
    what = "share of the patches that go on through the vision tower, the others merged into them: faster, not exact"
    add_share(parser, "--tower-share", f"{what} (default: the tower is untouched)")


def add_length_option(parser: argparse.ArgumentParser) -> None:
    """Add `--max-new-tokens`."""
    add_count(parser, "--max-new-tokens", "longest answer, in text tokens (default: %(default)s)", default=128)


def add_engine_options(parser: argparse.ArgumentParser, running: str, held: str) -> None:
    """Add `--max-running` and `--memory`: what runs at once, and what is held meanwhile, in the help's words."""
    add_count(parser, "--max-running", f"{running} (default: %(default)s)", default=MAX_RUNNING)
    what = f"for keys and values of {held}, for instance 8GiB (default: most of what the device has free)"
    parser.add_argument("--memory", metavar="SIZE", help=what)


def add_count(
    parser: argparse.ArgumentParser, option: str, what: str, *, metavar: str = "N", default: int | None = None
) -> None:
    """Add an option that takes a whole number from 1 on; another is a `UserError`."""

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            if int(text) >= 1:
                return int(text)
        raise UserError(f"{option} must be at least 1, got {text}")

    parser.add_argument(option, type=read, metavar=metavar, default=default, help=what)


def add_share(
    parser: argparse.ArgumentParser, option: str, what: str, *, metavar: str = "SHARE", **settings: Any
) -> None:
    """Add an option that takes a number in (0, 1]; another is a `UserError`."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            return share(option, float(text))
        raise UserError(f"{option} must be a number in (0, 1], got {text}")

    parser.add_argument(option, type=read, metavar=metavar, help=what, **settings)


def checked_rules(
    arguments: argparse.Namespace, *, ratios: Sequence[float] = (), shares: Sequence[float] = (), stock: bool
) -> list[Variant]:
    """The variants that the rule options ask for; what they need is loaded once their `config` is read.

    Args:
        arguments: parsed, of a parser with `generation_options`.
        ratios, shares: what `--top-k-ratio` and `--kept-share` are if no rule is given.
        stock: whether transformers' own cache comes first.

    Raises:
        UserError: a value is given twice, or a package is missing.
    """
    if arguments.kv_quantization is not None:
        with user_errors(ImportError):
            require_bitsandbytes(f"--kv-quantization {arguments.kv_quantization}")
    given = {name: getattr(arguments, name) or [] for name in ("top_k_ratio", "kept_share", "radius")}
    if not any(given.values()):
        given |= {"top_k_ratio": ratios, "kept_share": shares}
    for name, numbers in given.items():
        if len(set(numbers)) < len(numbers):
            raise UserError(f"--{name.replace('_', '-')}: the same value is given twice")
    return variants_for(
        given["top_k_ratio"],
        arguments.kv_quantization,
        shares=given["kept_share"],
        radii=given["radius"],
        merge=not arguments.no_merge,
        tower_share=arguments.tower_share,
        stock=stock,
    )


def one_rule(arguments: argparse.Namespace, *, exact: bool = False) -> Variant:
    """The one trimmed cache that the rule options ask for; if they don't say, the default rule, or exact mode.

    Raises:
        UserError: several rules are given, or a package is missing.
    """
    ratios, shares = ((1.0,), ()) if exact else ((), (DEFAULT_KEPT_SHARE,))
    chosen = checked_rules(arguments, ratios=ratios, shares=shares, stock=False)
    if len(chosen) > 1:
        raise UserError(
            f"several rules are given: {', '.join(variant.name for variant in chosen)}. Choose one; eval and demo compare them"
        )
    return chosen[0]


def pictures_of(names: Sequence[str]) -> list[Image.Image]:
    """Open the pictures of `--image` as RGB, or raise `UserError`."""
    from trim_plugin.pictures.prompting import open_picture

    found = []
    for path in _files(names, "--image"):
        if not path.is_file() and (str(path) == SMALL or (path / "config.json").is_file()):
            raise UserError(
                f"--image {path}: this is a model. It goes first: trim-plugin COMMAND {path} --image FILE …"
            )
        if _begins_as_safetensors(path):
            raise UserError(
                f"--image {path}: this is no picture. A file that `trim-plugin encode` wrote goes to --pictures"
            )
        with user_errors(FileNotFoundError, ValueError):
            found.append(open_picture(path))
    return found


def encoded_files(names: Sequence[str]) -> list[Path]:
    """The files of `--pictures`, which exist and are no plain pictures, or `UserError`."""
    from trim_plugin.pictures.prompting import BROKEN, opened

    found = _files(names, "--pictures")
    for path in found:
        if not path.is_file():
            raise UserError(f"no such file of encoded pictures: {path}")
        if _begins_as_safetensors(path):
            continue
        with contextlib.suppress(*BROKEN), opened(path):
            raise UserError(
                f"--pictures {path}: this is a picture, not a file that `trim-plugin encode` wrote. Give it as --image"
            )
    return found


def _files(names: Sequence[str], option: str) -> list[Path]:
    """Names as paths; addresses are refused."""
    for name in names:
        # A drive has one letter, and a file may have any name.
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/|data:", name) and not Path(name).exists():
            raise UserError(f"{option} {name}: addresses are not fetched. Download the picture, then give the file")
    return [Path(name) for name in names]


def _begins_as_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a header, and the header's JSON."""
    with contextlib.suppress(OSError, ValueError), open_regular(path) as file:
        return file.read(9)[8:] == b"{"
    return False


def needs(what: str, module: str, *packages: str) -> None:
    """Raise `UserError` that says what to install, unless a module can be imported. Does not import it."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{what} needs {module}, which is not installed. Install it: pip install {' '.join(packages)}")


def bytes_of(text: str, option: str, *, zero: bool = False) -> int:
    """`parse_bytes` of an option, or `UserError`."""
    with user_errors(ValueError, before=f"{option} "):
        return parse_bytes(text, zero=zero)


def memory_of(arguments: argparse.Namespace) -> int | None:
    """`--memory` in bytes, None where it isn't given, or `UserError`."""
    return None if arguments.memory is None else bytes_of(arguments.memory, "--memory")


def remarks(sizes: Iterable[tuple[str, str | None]]) -> list[str]:
    """What sizes that are given, each behind its option, were taken for, where a person may have meant something else."""
    return [remark for option, text in sizes if text is not None and (remark := taken_for(text, option)) is not None]


def check_folder_of(out: Path) -> None:
    """Raise `UserError` unless `--out` is to be written in a folder that exists, and nothing but a file stands there."""
    with user_errors(OSError):
        folder, taken = out.resolve().parent, out.exists() and not out.is_file()
    if not folder.is_dir():
        raise UserError(f"--out: no such folder: {folder}")
    if taken:
        raise UserError(f"--out {out} is a folder, a pipe or a device; give a file")


def progress(console: Console, process: int, *columns: ProgressColumn) -> Progress:
    """A bar over many answers, with columns of one's own before the time that is left; the first process alone shows it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    before = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*before, *columns, TimeRemainingColumn(), console=console, disable=process > 0)
