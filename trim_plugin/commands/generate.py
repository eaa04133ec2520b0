"""`trim-plugin generate`: answer a prompt about pictures with the trimmed cache, then say what it held."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from rich.console import Console

from trim_plugin.commands import COMMANDS, UserError
from trim_plugin.commands.common import check_ratio, first_line, picture_or_error, pretrained_loader
from trim_plugin.config import DEFAULT_TOP_K_RATIO, TrimConfig
from trim_plugin.embedded import SMALL_MODEL
from trim_plugin.kv_formats import KV_FORMATS
from trim_plugin.pictures.prompting import build_inputs

#: As in `trim_plugin.integrations.accelerate.WEIGHTS`, which is not imported before it is needed.
WEIGHTS = ("fp32", "bf16", "fp16", "nf4", "fp4", "int8")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("generate", help=COMMANDS["generate"])
    parser.add_argument("model", help="model folder or hub id; 'small' is the embedded small model")
    parser.add_argument(
        "--image", action="append", type=Path, default=[], help="a picture; may be given again (default: text only)"
    )
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--weights", choices=WEIGHTS, default="bf16", help="dtype or quantization (default: bf16)")
    parser.add_argument("--adapter", metavar="FOLDER", help="folder of a LoRA adapter (safetensors)")
    parser.add_argument(
        "--top-k-ratio",
        default=str(DEFAULT_TOP_K_RATIO),
        metavar="RATIO",
        help="share of visual tokens that each head keeps; 1 keeps all that can be read (default: %(default)s)",
    )
    parser.add_argument("--kv-quantization", choices=tuple(KV_FORMATS), help="keep cross-attention KV in 8 or 4 bits")
    parser.add_argument("--device-map", default="auto", help="'auto', 'balanced', 'sequential' or a device")
    parser.add_argument(
        "--max-memory",
        action="append",
        metavar="DEVICE=SIZE",
        help="what a device may hold, for instance 0=20GiB or cpu=60GiB; may be given again",
    )
    parser.add_argument("--offload-folder", type=Path, help="where weights go that fit nowhere else")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Check the options, load, stream the answer to stdout, then print the report.

    Raises:
        UserError: an option is wrong, or the model cannot be loaded.
    """
    from transformers import TextStreamer

    config = TrimConfig(top_k_ratio=check_ratio(arguments.top_k_ratio), kv_quantization=arguments.kv_quantization)
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    pictures = [picture_or_error(path) for path in arguments.image]
    _check_installed(config)
    model, processor = _load(arguments)
    inputs = _inputs(processor, arguments.prompt, pictures, model)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(
        **inputs,
        cache_implementation="trimmed",
        cache_config=config,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
        streamer=streamer,
        return_dict_in_generate=True,
    )
    print()
    print(output.past_key_values.report())


def _check_installed(config: TrimConfig) -> None:
    from trim_plugin.cache.quantized import require_bitsandbytes

    if config.kv_quantization is not None:
        try:
            require_bitsandbytes(f"--kv-quantization {config.kv_quantization}")
        except ImportError as error:
            raise UserError(str(error)) from None


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    # bitsandbytes logs a line for every 8-bit product in bfloat16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    path = str(SMALL_MODEL) if arguments.model == "small" else arguments.model
    console = Console(stderr=True)
    try:
        with console.status(f"loading {arguments.model}", spinner="dots"):
            return pretrained_loader()(
                path,
                arguments.weights,
                adapter=arguments.adapter,
                device_map=arguments.device_map,
                max_memory=_max_memory(arguments.max_memory),
                offload_folder=arguments.offload_folder,
            )
    except ImportError as error:
        raise UserError(first_line(error)) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load {arguments.model}: {first_line(error)}") from None


def _max_memory(entries: list[str] | None) -> dict[int | str, str] | None:
    """Read DEVICE=SIZE entries.

    Example:
        >>> _max_memory(["0=20GiB", "cpu=60GiB"])
        {0: '20GiB', 'cpu': '60GiB'}
    """
    if not entries:
        return None
    limits: dict[int | str, str] = {}
    for entry in entries:
        device, equals, size = entry.partition("=")
        if not (device and equals and size):
            raise UserError(f"--max-memory must look like 0=20GiB or cpu=60GiB, got {entry}")
        limits[int(device) if device.isdigit() else device] = size
    return limits


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
