"""What several subcommands share: opening pictures and models with errors that a user can act on."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from trim_plugin.commands import UserError
from trim_plugin.pictures.prompting import open_picture
from trim_plugin.rules.processors import share

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def check_device(text: str) -> str:
    """A `--device` that exists here, or `UserError`."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {text} cannot be used here: {first_line(error)}") from None
    return text


def load_model(path_or_id: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """An Mllama model in eval mode and its processor, from a folder or a hub id, or `UserError`."""
    from transformers import AutoProcessor, MllamaForConditionalGeneration

    check_is_mllama(path_or_id)
    try:
        model = MllamaForConditionalGeneration.from_pretrained(path_or_id, dtype=dtype)
        processor = AutoProcessor.from_pretrained(path_or_id)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {path_or_id}: {first_line(error)}") from None
    return model.to(device).eval(), processor


def pretrained_loader() -> Callable[..., tuple[Any, Any]]:
    """What loads quantized, adapted or spread-out models: the installed loader of the group `trim_plugin.loaders`.

    Raises:
        ImportError: none is installed, or it needs a package that is not.
    """
    loaders = importlib.metadata.entry_points(group="trim_plugin.loaders", name="pretrained")
    if not loaders:
        raise ImportError("trim-plugin is not installed here, only imported. Install it: pip install -e .")
    return next(iter(loaders)).load()


def check_is_mllama(path_or_id: str) -> None:
    """Read the configuration alone and raise `UserError` unless it is an Mllama model's."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path_or_id)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {path_or_id}: {first_line(error)}") from None
    if config.model_type != "mllama":
        raise UserError(
            f"{path_or_id} is a {config.model_type} model; trim-plugin needs an Mllama (Llama-3.2-Vision) model"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
