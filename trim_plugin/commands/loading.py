"""Finding and loading the model that a subcommand is asked for: whatever is wrong with it is said first, and as that."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from trim_plugin.commands import UserError
from trim_plugin.commands.common import SMALL, SPREAD, first_line
from trim_plugin.embedded import SMALL_MODEL

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: The hub is asked at most this long whether it knows a model; its own client tries for half a minute.
HUB_SECONDS = 10.0


def load_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model, in eval mode, and its processor, as the options of `common.add_model_options` say.

    Raises:
        UserError: no such model or adapter, another architecture, a device that isn't there, a missing package.
    """
    model, limits = model_of(arguments.model), _max_memory(arguments.max_memory)
    device = check_device(device_of(arguments.device, os.environ))
    if arguments.adapter is not None and not arguments.adapter.is_dir():
        raise UserError(f"no adapter in {arguments.adapter}: there is no such folder")
    check_is_mllama(model)
    weights = weights_of(arguments)
    # bitsandbytes logs a line for every 8-bit product in bfloat16, and which of its CPU kernels it could not get.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    plain = weights in DTYPES and arguments.adapter is None and limits is None and arguments.offload_folder is None
    try:
        with _progress(model):
            if plain and device not in SPREAD:
                return _load_plain(model, DTYPES[weights], device)
            return pretrained_loader()(
                model,
                weights,
                adapter=arguments.adapter,
                device_map=device if device in SPREAD else {"": device} if limits is None else "auto",
                max_memory=limits,
                offload_folder=arguments.offload_folder,
            )
    except ImportError as error:
        raise UserError(first_line(error)) from None
    except (OSError, ValueError, RuntimeError) as error:
        # Whatever is wrong with an adapter names its folder.
        blamed = arguments.adapter is not None and str(arguments.adapter) in str(error)
        what = f"--adapter {arguments.adapter}" if blamed else f"cannot load {name_of(arguments)}"
        raise UserError(f"{what}: {first_line(error)}") from None


def model_of(name: str | None) -> str:
    """The folder or hub id behind `--model`.

    Example:
        >>> Path(model_of(None)).name, model_of("org/name")
        ('small_model', 'org/name')
    """
    return str(SMALL_MODEL) if name in (None, SMALL) else str(name)


def name_of(arguments: argparse.Namespace) -> str:
    """What the model is called towards users: as they named it, and the small one by its name if they did not."""
    return SMALL if arguments.model is None else str(arguments.model)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What answers depend on, whatever is asked: kept beside them, so that another run's are not mixed in."""
    return {
        "model": name_of(arguments),
        "weights": weights_of(arguments),
        "adapter": None if arguments.adapter is None else str(arguments.adapter),
        "max_new_tokens": arguments.max_new_tokens,
    }


def weights_of(arguments: argparse.Namespace) -> str:
    """`--weights`, or what it is where it isn't given: the small model is exact in float32, large ones have 16 bits."""
    if arguments.weights is not None:
        return str(arguments.weights)
    return "fp32" if model_of(arguments.model) == str(SMALL_MODEL) else "bf16"


def process_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """Which process this is and of how many, as `accelerate launch` and `torchrun` say.

    Example:
        >>> process_of({"RANK": "1", "WORLD_SIZE": "4"}), process_of({})
        ((1, 4), (0, 1))
    """
    return int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))


def device_of(device: str, environment: Mapping[str, str]) -> str:
    """The device of this process: under a launcher every process takes a GPU of its own; "auto" is the CPU where there is none.

    Example:
        >>> device_of("cuda", {"LOCAL_RANK": "2", "WORLD_SIZE": "4"}), device_of("cpu", {"LOCAL_RANK": "2"})
        ('cuda:2', 'cpu')
    """
    if device in SPREAD and not torch.accelerator.is_available():
        return "cpu"
    several = int(environment.get("WORLD_SIZE", 1)) > 1
    # Spreading is accelerate's; without it a model goes to one device.
    if device in SPREAD and (several or importlib.util.find_spec("accelerate") is None):
        device = str(torch.accelerator.current_accelerator())
    return f"{device}:{environment.get('LOCAL_RANK', 0)}" if several and device in ("cuda", "xpu") else device


def check_device(text: str) -> str:
    """A `--device` that exists here, or `UserError`."""
    if text in SPREAD:
        return text
    try:
        if torch.empty(0, device=text).is_meta:
            raise UserError("--device meta holds no numbers, so it cannot be used here")
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {text} cannot be used here: {first_line(error)}") from None
    return text


def check_is_mllama(path_or_id: str) -> None:
    """Read the configuration alone and raise `UserError` unless it is an Mllama model's."""
    from transformers import AutoConfig

    if not Path(path_or_id).is_dir():
        _check_hub_knows(path_or_id)
    elif not (Path(path_or_id) / "config.json").is_file():
        raise UserError(f"cannot load {path_or_id}: there is no config.json in it")
    try:
        config = AutoConfig.from_pretrained(path_or_id)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {path_or_id}: {first_line(error)}") from None
    if config.model_type != "mllama":
        raise UserError(
            f"{path_or_id} is a {config.model_type} model; trim-plugin needs an Mllama (Llama-3.2-Vision) model"
        )


def pretrained_loader() -> Callable[..., tuple[Any, Any]]:
    """What loads quantized, adapted or spread-out models: the installed loader of the group `trim_plugin.loaders`.

    Raises:
        ImportError: none is installed, or it needs a package that is not.
    """
    loaders = importlib.metadata.entry_points(group="trim_plugin.loaders", name="pretrained")
    if not loaders:
        raise ImportError("trim-plugin is not installed here, only imported. Install it: pip install -e .")
    return next(iter(loaders)).load()


def _load_plain(path_or_id: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    from transformers import AutoProcessor, MllamaForConditionalGeneration

    model = MllamaForConditionalGeneration.from_pretrained(path_or_id, dtype=dtype)
    return model.to(device).eval(), AutoProcessor.from_pretrained(path_or_id)


def _check_hub_knows(name: str) -> None:
    """Raise `UserError` at once if `name` can be neither a folder nor a model that is cached here or known to the hub."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    path = Path(name)
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not path.parent.is_dir()
    if not is_id:
        raise UserError(f"cannot load {name}: there is no such folder, and a hub id looks like owner/name")
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        huggingface_hub.HfApi().model_info(name, timeout=HUB_SECONDS)
    except GatedRepoError:
        return  # its own message says where to ask for access
    except RepositoryNotFoundError:
        raise UserError(f"cannot load {name}: it is neither a folder here nor known to the hub") from None
    except Exception as error:
        # Without a network the hub's client raises what its HTTP library does, and that has changed twice.
        of_http = type(error).__module__.startswith(("http", "requests", "urllib3"))
        if not isinstance(error, HfHubHTTPError | OSError) and not of_http:
            raise
        why = first_line(error).rstrip(".")
        raise UserError(f"cannot load {name}: there is no such folder, and the hub cannot be asked ({why})") from None


@contextlib.contextmanager
def _progress(model: str) -> Iterator[None]:
    """A spinner; transformers' own bar says nothing about a model that loads at once."""
    from transformers.utils import logging as transformers_logging

    quiet = model == str(SMALL_MODEL) and transformers_logging.is_progress_bar_enabled()
    if quiet:
        transformers_logging.disable_progress_bar()
    try:
        with Console(stderr=True).status(f"loading {SMALL if model == str(SMALL_MODEL) else model}"):
            yield
    finally:
        if quiet:
            transformers_logging.enable_progress_bar()


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
