"""`trim-plugin plan`: what a generation will take, from a configuration alone. It loads neither torch nor transformers."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from trim_plugin.commands import common, loading, plain_console, user_errors
from trim_plugin.config import DEFAULT_KEPT_SHARE
from trim_plugin.kv_formats import KV_FORMATS
from trim_plugin.planning import configuration, fitting, planner, table
from trim_plugin.planning.job import Job
from trim_plugin.planning.model_sizes import WEIGHT_FORMATS

DEFAULT_MODEL = "11b"


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = common.add_command(subparsers, "plan", run)
    _add_job(parser)
    several: dict[str, Any] = {"action": "extend", "nargs": "+", "default": []}
    parser.add_argument(
        "--weights", choices=WEIGHT_FORMATS, default="bf16", help="dtype or quantization (default: %(default)s)"
    )
    common.add_share(
        parser,
        "--top-k-ratio",
        "the paper's rule: share of the visual tokens that each head keeps; several are several rows (default: not used)",
        metavar="RATIO",
        **several,
    )
    what = f"KCenter: keep this share; several are several rows (default: {DEFAULT_KEPT_SHARE})"
    common.add_share(parser, "--kept-share", what, **several)
    common.add_share(
        parser,
        "--expect-kept",
        "a forecast: the share of the visible tokens that another rule will keep, if you know it; several are several rows "
        "(default: as measured at the ratio)",
        **several,
    )
    parser.add_argument(
        "--kv-quantization",
        choices=tuple(KV_FORMATS),
        help="hold the kept tokens of exact and trimmed in 8 or 4 bits (default: in the model's dtype)",
    )
    what = "most pictures that are read at a time, as in TrimConfig (default: near one 11B picture's room)"
    common.add_count(parser, "--prefill-pictures", what)
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
    common.add_model(
        parser, f"11b, 90b, small, a folder or a hub id; only its configuration is read (default: {DEFAULT_MODEL})"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="samples (default: as many as --tiles names)")
    parser.add_argument(
        "--expand-size",
        "--copies",
        type=int,
        default=1,
        metavar="N",
        help="beams times returned sequences of a sample (default: %(default)s)",
    )
    parser.add_argument("--images", type=int, default=1, metavar="N", help="images a sample (default: %(default)s)")
    parser.add_argument(
        "--tiles",
        action="extend",
        nargs="+",
        type=int,
        metavar="N",
        help="real tiles of an image; several are those of the samples one by one, repeated to the batch (default: 4)",
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
    common.add_tower_option(parser)
    parser.add_argument(
        "--prompt-tokens", type=int, default=128, metavar="N", help="text tokens of the prompt (default: %(default)s)"
    )
    common.add_length_option(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the plan."""
    memory, reserve = common.memory_of(arguments), common.bytes_of(arguments.reserve, "--reserve", zero=True)
    model = arguments.model or DEFAULT_MODEL
    config = _config(model)
    with user_errors(ValueError):
        job = _job(arguments)
        variants = planner.variants(
            arguments.top_k_ratio,
            [*arguments.kept_share, *arguments.expect_kept],
            arguments.kv_quantization,
            arguments.prefill_pictures,
            arguments.tower_share,
        )
        settings: dict[str, Any] = {"weights": arguments.weights, "reserve": reserve}
        plans = [planner.plan(config, job, variant, **settings) for variant in variants]
    fits = {}
    if memory is not None:
        fits = {one.name: fitting.largest_fit(config, job, one, memory, **settings) for one in variants}
    for remark in common.remarks([("--memory", arguments.memory), ("--reserve", arguments.reserve)]):
        print(remark, file=sys.stderr)
    if arguments.json:
        print(json.dumps(_result(model, job, plans, memory, fits), indent=2))
    else:
        table.show(plain_console(), model, job, arguments.weights, plans, memory, fits)


def _job(arguments: argparse.Namespace) -> Job:
    tiles = arguments.tiles or [4]
    return Job(
        batch=len(tiles) if arguments.batch is None else arguments.batch,
        images=arguments.images,
        tiles=tiles[0] if len(tiles) == 1 else tuple(tiles),
        readable_images=1 if arguments.interleaved else None,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.max_new_tokens,
        expand_size=arguments.expand_size,
        pixels_on_device=arguments.pixels_on_device,
    )


def _result(
    model: str, job: Job, plans: list[planner.Plan], memory: int | None, fits: dict[str, fitting.Fit]
) -> dict[str, Any]:
    """What `--json` prints."""
    variants = []
    for one in plans:
        entry = one.as_dict()
        if memory is not None:
            fit = fits[one.variant.name]
            entry |= vars(fit) | {"fits": one.needed <= memory}
        variants.append(entry)
    return {"model": model, "job": vars(job), "memory": memory, "reserve": plans[0].reserve, "ways": variants}


def _config(model: str) -> configuration.ModelNumbers:
    if model.lower() in configuration.SHAPES:
        return configuration.built_in_config(model.lower())
    return loading.model_numbers(loading.model_of(model))
