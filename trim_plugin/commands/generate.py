"""`trim-plugin generate`: answer a prompt about pictures with the trimmed cache, then say what it held."""

from __future__ import annotations

import argparse
import functools
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trim_plugin.commands import UserError, user_errors
from trim_plugin.commands.common import (
    add_command,
    add_image_option,
    check_counts,
    encoded_files,
    generation_options,
    one_rule,
    pictures_of,
)
from trim_plugin.commands.loading import begin_loading, load_model
from trim_plugin.compat import CACHE, cache_of
from trim_plugin.config import DEFAULT_KEPT_SHARE, TrimConfig

if TYPE_CHECKING:
    from trim_plugin.pictures.encoded import Pictures


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    options = generation_options(ratios="1 with --pictures", shares=f"{DEFAULT_KEPT_SHARE} without --pictures")
    parser = add_command(subparsers, "generate", run, [options])
    add_image_option(parser, "pictures, in the order in which the prompt reads them (default: text only)")
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
    """Check the options, load, stream the answer to stdout, then print the report.

    Raises:
        UserError: an option is wrong, or the model cannot be loaded.
    """
    rule = one_rule(arguments, exact=bool(arguments.pictures))
    check_counts(arguments, "max_new_tokens")
    if arguments.image and arguments.pictures:
        raise UserError("--image and --pictures are both given. Encode the images too: trim-plugin encode")
    if arguments.pictures and arguments.tower_share is not None:
        raise UserError(
            "--tower-share and --pictures are both given, but encoded pictures need no tower. Give it to encode"
        )
    pictures, files = pictures_of(arguments.image), encoded_files(arguments.pictures)
    begin_loading(arguments)
    config, encoded = rule.config, _encoded(files)
    model, processor = load_model(arguments)
    if encoded is None:
        inputs = _inputs(processor, arguments.prompt, pictures, model)
        _answer(model, processor, inputs | {"cache_implementation": "trimmed", "cache_config": config}, arguments)
    else:
        _answer(model, processor, _known(model, processor, encoded, config, arguments.prompt), arguments)


def _encoded(files: list[Path]) -> Pictures | None:
    """The pictures of these files in a row; None without any."""
    from trim_plugin.pictures.encoded import Pictures

    if not files:
        return None
    with user_errors(OSError, ValueError):
        return functools.reduce(operator.add, [Pictures.load(file) for file in files])


def _known(model: Any, processor: Any, pictures: Pictures, config: TrimConfig | None, prompt: str) -> dict[str, Any]:
    """What `generate` is given to answer a prompt about encoded pictures."""
    from trim_plugin.forward.hooks import TrimmedCache

    with user_errors(ValueError):
        inputs: dict[str, Any] = dict(pictures.inputs(processor, prompt, model.device))
        return inputs | {CACHE: TrimmedCache(model, config, pictures=pictures)}


def _answer(model: Any, processor: Any, inputs: dict[str, Any], arguments: argparse.Namespace) -> None:
    from transformers import TextStreamer

    output = model.generate(
        **inputs,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
        streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
        return_dict_in_generate=True,
    )
    print()
    print(cache_of(output).report())


def _inputs(processor: Any, prompt: str, pictures: list[Any], model: Any) -> dict[str, Any]:
    """Inputs on the model's device, pictures in its dtype."""
    from trim_plugin.pictures.prompting import build_inputs

    inputs: dict[str, Any] = (
        build_inputs(processor, prompt, pictures, model.device) if pictures else _text_inputs(processor, prompt, model)
    )
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs


def _text_inputs(processor: Any, prompt: str, model: Any) -> dict[str, Any]:
    if getattr(processor, "chat_template", None):
        messages = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    return {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
