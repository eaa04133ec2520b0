"""`trim-plugin plan`: what a generation will take, from a configuration alone."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from rich.console import Console

from trim_plugin.commands import UserError
from trim_plugin.commands.common import (
    WEIGHTS,
    add_command,
    add_length_option,
    add_tower_option,
    check_counts,
    check_ratio,
    tower_share,
)
from trim_plugin.commands.loading import check_is_mllama, model_of
from trim_plugin.config import DEFAULT_TOP_K_RATIO
from trim_plugin.kv_formats import KV_FORMATS
from trim_plugin.planning import fitting, model_sizes, planner, table
from trim_plugin.planning.job import Job

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = add_command(subparsers, "plan", run)
    _add_job(parser)
    several: dict[str, Any] = {"action": "extend", "nargs": "+"}
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="bf16", help="dtype or quantization (default: %(default)s)"
    )
    parser.add_argument(
        "--top-k-ratio",
        **several,
        metavar="RATIO",
        help="the paper's rule: share of the visual tokens that each head keeps; several are several columns "
        f"(default: {DEFAULT_TOP_K_RATIO})",
    )
    parser.add_argument(
        "--kept-share",
        **several,
        metavar="SHARE",
        help="share of the visible tokens that is kept, if you know it; several are several columns "
        "(default: as measured at the ratio)",
    )
    parser.add_argument(
        "--kv-quantization",
        choices=tuple(KV_FORMATS),
        help="hold the kept tokens of exact and trimmed in 8 or 4 bits (default: in the model's dtype)",
    )
    parser.add_argument(
        "--prefill-pictures",
        type=int,
        metavar="N",
        help="most pictures that are read at a time, as in TrimConfig (default: near one 11B picture's room)",
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="what the device has, for instance 24GiB: what fits (default: not asked)"
    )
    parser.add_argument(
        "--reserve",
        default="1GiB",
        metavar="SIZE",
        help="left free for the CUDA context (about half a GiB) and fragmentation (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON (default: a table)")


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="11b",
        help="11b, 90b, small, a model folder or a hub id; only its configuration is read (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="samples (default: %(default)s)")
    parser.add_argument(
        "--copies",
        type=int,
        default=1,
        metavar="N",
        help="beams times returned sequences of a sample (default: %(default)s)",
    )
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
        "--pixels-on-device",
        action="store_true",
        help="the whole batch's pixel_values lie on the device, in float32 (default: they stay on the CPU)",
    )
    add_tower_option(parser)
    parser.add_argument(
        "--prompt-tokens", type=int, default=128, metavar="N", help="text tokens of the prompt (default: %(default)s)"
    )
    add_length_option(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the plan.

    Raises:
        UserError: an option is wrong.
    """
    shares = [check_ratio(text, "--kept-share") for text in arguments.kept_share or []]
    ratios = [check_ratio(text) for text in arguments.top_k_ratio or ([] if shares else [DEFAULT_TOP_K_RATIO])]
    memory = None if arguments.memory is None else parse_bytes(arguments.memory)
    settings: dict[str, Any] = {
        "weights": arguments.weights,
        "reserve": parse_bytes(arguments.reserve, "--reserve", zero=True),
    }
    check_counts(arguments, "prefill_pictures")
    config = _config(arguments.model)
    try:
        job = Job(
            batch=arguments.batch,
            images=arguments.images,
            tiles=arguments.tiles,
            readable_images=1 if arguments.interleaved else None,
            prompt_tokens=arguments.prompt_tokens,
            new_tokens=arguments.max_new_tokens,
            copies=arguments.copies,
            pixels_on_device=arguments.pixels_on_device,
        )
        share = tower_share(arguments)
        ways = planner.ways(ratios, shares, arguments.kv_quantization, arguments.prefill_pictures, share)
        plans = [planner.plan(config, job, way, **settings) for way in ways]
    except ValueError as error:
        raise UserError(str(error)) from None
    fits, changes = {}, {}
    if memory is not None:
        for way, one in zip(ways, plans, strict=True):
            fits[way.name] = fitting.largest_fit(config, job, way, memory, **settings)
            if one.needed > memory:
                changes[way.name] = fitting.cheapest_change(config, job, way, memory, **settings)
    if arguments.json:
        print(json.dumps(_result(arguments.model, job, plans, memory, fits, changes), indent=2))
        return
    table.show(Console(), arguments.model, job, plans, memory, fits, changes)


def _result(
    model: str,
    job: Job,
    plans: list[planner.Plan],
    memory: int | None,
    fits: dict[str, fitting.Fit],
    changes: dict[str, fitting.Change | None],
) -> dict[str, Any]:
    """What `--json` prints."""
    ways = []
    for one in plans:
        name, entry = one.way.name, one.as_dict()
        if memory is not None:
            fit, change = fits[name], changes.get(name)
            entry |= {"largest_batch": fit.largest_batch, "limit": fit.limit, "reason": fit.reason}
            entry |= {"fits": one.needed <= memory, "change": None if change is None else list(change.words)}
        ways.append(entry)
    return {"model": model, "job": vars(job), "memory": memory, "reserve": plans[0].reserve, "ways": ways}


def parse_bytes(text: str, option: str = "--memory", *, zero: bool = False) -> int:
    """A number of bytes with its unit, such as 24GiB, 80GB or 500MiB, or `UserError`.

    Args:
        text: what the user gave.
        option: its name, for the error.
        zero: whether nothing is allowed, with or without a unit.

    Example:
        >>> parse_bytes("1.5GiB"), parse_bytes("2MB"), parse_bytes("0", zero=True)
        (1610612736, 2000000, 0)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or (match[2] and match[2].upper() not in _UNITS):
        raise UserError(f"{option} must look like 24GiB, 80GB or 500MiB, got {text}")
    number, unit = float(match[1]), match[2].upper()
    if number == 0 and zero:
        return 0
    if not unit:
        raise UserError(f"{option} needs a unit: {match[1]}GiB, {match[1]}GB or {match[1]}MiB, got {text}")
    if number == 0:
        raise UserError(f"{option} must be more than nothing, got {text}")
    return int(number * _UNITS[unit])


def _config(model: str) -> Any:
    if model.lower() in model_sizes.SHAPES:
        return model_sizes.built_in_config(model.lower())
    from transformers import AutoConfig

    check_is_mllama(model_of(model))
    return AutoConfig.from_pretrained(model_of(model))
