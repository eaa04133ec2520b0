"""`trim-plugin generate`: answer a prompt about pictures with the trimmed cache, then say what it held."""

from __future__ import annotations

import argparse
import functools
import operator
from typing import Any

from trim_plugin.commands import UserError, common, loading, user_errors
from trim_plugin.config import DEFAULT_KEPT_SHARE


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    options = common.generation_options(ratios="1 with --pictures", shares=f"{DEFAULT_KEPT_SHARE} without --pictures")
    parser = common.add_command(subparsers, "generate", run, [options])
    common.add_image_option(parser, "pictures, in the order in which the prompt reads them (default: text only)")
    parser.add_argument(
        "--pictures",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="instead of --image: files that `trim-plugin encode` wrote, in a row; no vision tower runs (default: none)",
    )
    parser.add_argument("--prompt", required=True, help="the question")


def run(arguments: argparse.Namespace) -> None:
    """Check the options, load, stream the answer to stdout, then print the report."""
    rule = common.one_rule(arguments, exact=bool(arguments.pictures))
    if arguments.image and arguments.pictures:
        raise UserError("--image and --pictures are both given. Encode the images too: trim-plugin encode")
    if arguments.pictures and arguments.tower_share is not None:
        raise UserError(
            "--tower-share and --pictures are both given, but encoded pictures need no tower. Give it to encode"
        )
    pictures, files = common.pictures_of(arguments.image), common.encoded_files(arguments.pictures)
    loading.begin_loading(arguments)
    from transformers import TextStreamer

    from trim_plugin.asking.answers import Inputs, answer
    from trim_plugin.pictures.encoded import Pictures
    from trim_plugin.pictures.prompting import written

    with user_errors(OSError, ValueError):
        encoded = [Pictures.load(file) for file in files]
    model, processor = loading.load_model(arguments)
    with user_errors(ValueError):
        if encoded:
            inputs = Inputs.about(processor, [arguments.prompt], [functools.reduce(operator.add, encoded)])
        else:
            prompt = written(processor, arguments.prompt, len(pictures))
            inputs = Inputs.of(processor, [prompt], [pictures])
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        _, cache = answer(model, processor, inputs, rule.config, arguments.max_new_tokens, streamer=streamer)
    print(f"\n{cache.report()}")
