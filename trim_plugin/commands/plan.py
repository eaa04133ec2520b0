"""`trim-plugin plan`: what a generation will take, from a configuration alone."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from rich.console import Console
from rich.table import Table

from trim_plugin.cache.report import format_bytes
from trim_plugin.commands import COMMANDS, UserError
from trim_plugin.commands.common import WEIGHTS, add_length_option, check_ratio
from trim_plugin.commands.loading import check_is_mllama, model_of
from trim_plugin.config import DEFAULT_TOP_K_RATIO
from trim_plugin.kv_formats import KV_FORMATS
from trim_plugin.planning import model_sizes, planner

#: The planner's names of `--weights`; 4-bit formats take the same room.
PLANNED_AS = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16", "fp4": "nf4"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("plan", help=COMMANDS["plan"], description=COMMANDS["plan"])
    parser.add_argument(
        "--model",
        default="11b",
        help="11b, 90b, small, a model folder or a hub id; only its configuration is read (default: %(default)s)",
    )
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="bf16", help="dtype or quantization (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="samples (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="images a sample (default: %(default)s)")
    parser.add_argument(
        "--tiles", type=int, default=4, metavar="N", help="real tiles of an image (default: %(default)s)"
    )
    parser.add_argument(
        "--interleaved",
        action="store_true",
        help="text between the images: the end reads the last only (default: it reads all)",
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=128, metavar="N", help="text tokens of the prompt (default: %(default)s)"
    )
    add_length_option(parser)
    parser.add_argument(
        "--top-k-ratio",
        default=str(DEFAULT_TOP_K_RATIO),
        metavar="RATIO",
        help="the paper's rule: share of the visual tokens that each head keeps (default: %(default)s)",
    )
    parser.add_argument(
        "--kept-share",
        type=float,
        metavar="SHARE",
        help="share of the visible tokens that is kept, if you know it (default: as measured at the ratio)",
    )
    parser.add_argument(
        "--kv-quantization",
        choices=tuple(KV_FORMATS),
        help="hold the kept tokens of exact and trimmed in 8 or 4 bits (default: in the model's dtype)",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="find the largest batch that fits, for instance 24GiB (default: not looked for)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON (default: a table)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the plan.

    Raises:
        UserError: an option is wrong.
    """
    ratio = check_ratio(arguments.top_k_ratio)
    memory = None if arguments.memory is None else parse_bytes(arguments.memory)
    config = _config(arguments.model)
    settings = {
        "weights": PLANNED_AS.get(arguments.weights, arguments.weights),
        "top_k_ratio": ratio,
        "kept_share": arguments.kept_share,
        "kv": arguments.kv_quantization,
    }
    try:
        job = planner.Job(
            arguments.batch,
            arguments.images,
            arguments.tiles,
            1 if arguments.interleaved else None,
            arguments.prompt_tokens,
            arguments.max_new_tokens,
        )
        ways = planner.plan(config, job, **settings)
        fits = None if memory is None else planner.largest_fit(config, job, memory, **settings)
    except ValueError as error:
        raise UserError(str(error)) from None
    assumed = planner.expected_kept_share(ratio) if arguments.kept_share is None else arguments.kept_share
    if arguments.json:
        result = {
            "model": arguments.model,
            "job": vars(job),
            "settings": settings | {"kept_share": assumed},
            "ways": [way.as_dict() for way in ways],
            "memory": memory,
            "fits": None if fits is None else {name: vars(fit) for name, fit in fits.items()},
        }
        print(json.dumps(result, indent=2))
        return
    console = Console()
    console.print(_table(arguments.model, ways, fits))
    console.print(
        f"Weights and KV are exact; the working set is an estimate. Trimmed: {100 * assumed:.0f} % of the readable visual "
        "tokens kept"
        + ("" if arguments.kept_share else ", as measured on the small model at this ratio; --kept-share sets it")
        + ".",
        style="dim",
        highlight=False,
    )


def parse_bytes(text: str) -> int:
    """A number of bytes such as 24GiB, 80GB or 1000000, or `UserError`.

    Example:
        >>> parse_bytes("1.5GiB"), parse_bytes("2MB")
        (1610612736, 2000000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise UserError(f"--memory must look like 24GiB, 80GB or 500MiB, got {text}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _config(model: str) -> Any:
    if model.lower() in model_sizes.SHAPES:
        return model_sizes.built_in_config(model.lower())
    from transformers import AutoConfig

    check_is_mllama(model_of(model))
    return AutoConfig.from_pretrained(model_of(model))


def _table(model: str, ways: list[planner.Plan], fits: dict[str, planner.Fit] | None) -> Table:
    table = Table(title=f"memory of {model}", title_justify="left", title_style="bold")
    table.add_column("")
    for way in ways:
        table.add_column(way.name, justify="right", no_wrap=True)
    for part in ways[0].weights:
        table.add_row(f"weights: {part}", *(format_bytes(way.weights[part]) for way in ways))
    table.add_section()
    table.add_row("visual tokens held", *(str(way.kept_tokens) for way in ways))
    table.add_row("cross-attention KV", *(format_bytes(way.cross_kv) for way in ways))
    table.add_row("self-attention KV", *(format_bytes(way.self_kv) for way in ways))
    table.add_row("prefill working set (estimate)", *(format_bytes(way.working) for way in ways))
    table.add_section()
    table.add_row("peak", *(format_bytes(way.peak) for way in ways))
    if fits is not None:
        table.add_row("largest batch of one generate", *(str(fits[way.name].batch) for way in ways))
        table.add_row("conversations side by side", *(str(fits[way.name].side_by_side) for way in ways))
    return table
