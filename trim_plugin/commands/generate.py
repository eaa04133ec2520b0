"""`trim-plugin generate`: answer a prompt about pictures with the trimmed cache, then say what it held."""

from __future__ import annotations

import argparse
import functools
import operator
from pathlib import Path
from typing import Any

from trim_plugin.commands import UserError
from trim_plugin.commands.common import (
    add_command,
    add_generation_options,
    check_counts,
    one_way,
    picture_or_error,
    user_errors,
)
from trim_plugin.commands.loading import load_model
from trim_plugin.compat import CACHE, cache_of
from trim_plugin.config import DEFAULT_TOP_K_RATIO, TrimConfig
from trim_plugin.forward.hooks import TrimmedCache
from trim_plugin.pictures.encoded import Pictures
from trim_plugin.pictures.prompting import build_inputs


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = add_command(subparsers, "generate", run, model_word=True)
    parser.add_argument(
        "--image",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="a picture; may be given again (default: text only)",
    )
    parser.add_argument(
        "--pictures",
        action="extend",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="instead of --image: files that `trim-plugin encode` wrote, in a row; no vision tower runs (default: none)",
    )
    parser.add_argument("--prompt", required=True, help="the question")
    add_generation_options(parser, f"{DEFAULT_TOP_K_RATIO}, with --pictures 1")


def run(arguments: argparse.Namespace) -> None:
    """Check the options, load, stream the answer to stdout, then print the report.

    Raises:
        UserError: an option is wrong, or the model cannot be loaded.
    """
    config = one_way(arguments, 1.0 if arguments.pictures else DEFAULT_TOP_K_RATIO).config
    check_counts(arguments, "max_new_tokens")
    if arguments.image and arguments.pictures:
        raise UserError("--image and --pictures are both given. Encode the images too: trim-plugin encode")
    if arguments.pictures and arguments.tower_share is not None:
        raise UserError(
            "--tower-share and --pictures are both given, but encoded pictures need no tower. Give it to encode"
        )
    pictures = [picture_or_error(path) for path in arguments.image]
    encoded = _encoded(arguments.pictures)
    model, processor = load_model(arguments)
    if encoded is None:
        inputs = _inputs(processor, arguments.prompt, pictures, model)
        _answer(model, processor, inputs | {"cache_implementation": "trimmed", "cache_config": config}, arguments)
    else:
        _answer(model, processor, _known(model, processor, encoded, config, arguments.prompt), arguments)


def _encoded(files: list[Path]) -> Pictures | None:
    """The pictures of these files in a row; None without any."""
    if not files:
        return None
    with user_errors(OSError, ValueError):
        return functools.reduce(operator.add, [Pictures.load(file) for file in files])


def _known(model: Any, processor: Any, pictures: Pictures, config: TrimConfig | None, prompt: str) -> dict[str, Any]:
    """What `generate` is given to answer a prompt about encoded pictures."""
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
    inputs = (
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
