"""Finds and loads the model that a subcommand is asked for, and says what is wrong with it before anything is loaded."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trim_plugin.commands import UserError, first_line, user_errors
from trim_plugin.commands.common import SMALL, SPREAD, bytes_of, needs, remarks
from trim_plugin.embedded import SMALL_MODEL
from trim_plugin.kv_formats import require_bitsandbytes
from trim_plugin.planning.configuration import ModelNumbers, read_config

#: Names of torch's dtypes.
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
#: The hub is asked at most this long whether it knows a model; its own client tries for half a minute.
HUB_SECONDS = 10.0


def begin_loading(arguments: argparse.Namespace) -> None:
    """Check what can be checked of a model before anything is loaded, then say that it is being loaded.

    To be called before torch is imported, which alone takes seconds.

    Raises:
        UserError: no such model or adapter, another architecture, a missing package, a wrong `--max-memory`.
    """
    _max_memory(arguments.max_memory)
    if arguments.adapter is not None:
        if not arguments.adapter.is_dir():
            raise UserError(f"no adapter in {arguments.adapter}: there is no such folder")
        needs("--adapter", "peft", "peft", "accelerate")
    model_numbers(model_of(arguments.model))
    if weights_of(arguments) not in DTYPES:
        with user_errors(ImportError):
            require_bitsandbytes(f"--weights {arguments.weights}")
    if process_of(os.environ)[0] == 0:
        entries = [entry.partition("=") for entry in arguments.max_memory or []]
        sizes = [(f"--max-memory {device}:", size) for device, _, size in entries]
        for remark in remarks([*sizes, ("--memory", getattr(arguments, "memory", None))]):
            print(f"trim-plugin {arguments.command}: {remark}", file=sys.stderr)
        print(f"trim-plugin {arguments.command}: loading {name_of(arguments)} ...", file=sys.stderr, flush=True)


def load_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model, in eval mode, and its processor, as the options of `common.model_options` say; after `begin_loading`.

    Raises:
        UserError: a device that isn't there, or whatever else is wrong with the model.
    """
    model, limits = model_of(arguments.model), _max_memory(arguments.max_memory)
    device = check_device(device_of(arguments.device, os.environ))
    weights = weights_of(arguments)
    # bitsandbytes logs a line for every 8-bit product in bfloat16, and which of its CPU kernels it could not get.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    plain = weights in DTYPES and arguments.adapter is None and limits is None and arguments.offload_folder is None
    try:
        with _without_a_bar(model):
            if plain and device not in SPREAD:
                return _load_plain(model, DTYPES[weights], device)
            # What loads quantized, adapted or spread-out models; integrations know the package, not the other way round.
            return plugged_in("trim_plugin.loaders", "pretrained")(
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
        if _is_gated(error):
            raise _gated(model) from None
        # Whatever is wrong with an adapter names its folder.
        blamed = arguments.adapter is not None and str(arguments.adapter) in str(error)
        what = f"--adapter {arguments.adapter}" if blamed else f"cannot load {name_of(arguments)}"
        raise UserError(f"{what}: {first_line(error)}") from None


def model_of(name: str | None) -> str:
    """The folder or hub id behind a model's name.

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
    import torch

    if device in SPREAD and not torch.accelerator.is_available():
        return "cpu"
    several = int(environment.get("WORLD_SIZE", 1)) > 1
    if device in SPREAD and several:  # every process has a device of its own
        device = str(torch.accelerator.current_accelerator())
    return f"{device}:{environment.get('LOCAL_RANK', 0)}" if several and device in ("cuda", "xpu") else device


def check_device(text: str) -> str:
    """A `--device` that exists here, or `UserError`."""
    import torch

    if text in SPREAD:
        return text
    with user_errors(RuntimeError, AssertionError, before=f"--device {text} cannot be used here: "):
        if torch.empty(0, device=text).is_meta:
            raise UserError("--device meta holds no numbers, so it cannot be used here")
    return text


def model_numbers(path_or_id: str) -> ModelNumbers:
    """The numbers in a model's configuration; neither torch nor transformers is loaded, and of a hub's model only that file.

    Raises:
        UserError: there is no such model, it may not be read, or it is another architecture's.
    """
    folder = Path(path_or_id)
    file = folder / "config.json" if folder.is_dir() else _from_hub(path_or_id)
    if not file.is_file():
        raise UserError(f"cannot load {path_or_id}: there is no config.json in it")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot load {path_or_id}: its config.json is not JSON ({first_line(error)})") from None
    with user_errors(ValueError, before=f"{path_or_id} is "):
        return read_config(settings)


def plugged_in(group: str, name: str) -> Callable[..., Any]:
    """What is installed under this name of a group of entry points, as pyproject.toml has them.

    Raises:
        ImportError: nothing is, or it needs a package that is not.
    """
    found = importlib.metadata.entry_points(group=group, name=name)
    if not found:
        raise ImportError("trim-plugin is not installed here, only imported. Install it: pip install -e .")
    return next(iter(found)).load()


def _load_plain(path_or_id: str, dtype: str, device: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoProcessor, MllamaForConditionalGeneration

    model = MllamaForConditionalGeneration.from_pretrained(path_or_id, dtype=getattr(torch, dtype))
    return model.to(device).eval(), AutoProcessor.from_pretrained(path_or_id)


def _from_hub(name: str) -> Path:
    """The config.json of a hub's model: the one that is cached here, or downloaded now.

    Raises:
        UserError: `name` can be neither a folder nor a hub id, or the hub does not know it or does not give it away.
    """
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None or Path(name).parent.is_dir():
        raise UserError(f"cannot load {name}: there is no such folder, and a hub id looks like owner/name")
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    try:
        huggingface_hub.HfApi().model_info(name, timeout=HUB_SECONDS)
        return Path(huggingface_hub.hf_hub_download(name, "config.json", etag_timeout=HUB_SECONDS))
    except GatedRepoError:
        raise _gated(name) from None
    except RepositoryNotFoundError:
        raise UserError(f"cannot load {name}: it is neither a folder here nor known to the hub") from None
    except EntryNotFoundError:
        raise UserError(f"cannot load {name}: there is no config.json in it") from None
    except Exception as error:
        # Without a network the hub's client raises what its HTTP library does, and that has changed twice.
        of_http = type(error).__module__.startswith(("http", "requests", "urllib3"))
        if not isinstance(error, HfHubHTTPError | OSError) and not of_http:
            raise
        why = first_line(error).rstrip(".")
        raise UserError(f"cannot load {name}: there is no such folder, and the hub cannot be asked ({why})") from None


def _gated(name: str) -> UserError:
    from huggingface_hub.constants import ENDPOINT

    return UserError(
        f"cannot load {name}: it is a gated model, and the hub does not give it to you. Ask for access at {ENDPOINT}/{name}, "
        "then log in with your token: hf auth login (or set HF_TOKEN)"
    )


def _is_gated(error: BaseException | None) -> bool:
    """Whether the hub's refusal is behind an error: transformers raises one of its own in its place."""
    from huggingface_hub.errors import GatedRepoError

    while error is not None:
        if isinstance(error, GatedRepoError):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _without_a_bar(model: str) -> Iterator[None]:
    """transformers' own bar says nothing about a model that loads at once."""
    from transformers.utils import logging as transformers_logging

    quiet = model == str(SMALL_MODEL) and transformers_logging.is_progress_bar_enabled()
    if quiet:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet:
            transformers_logging.enable_progress_bar()


def _max_memory(entries: list[str] | None) -> dict[int | str, int] | None:
    """Read DEVICE=SIZE entries.

    Example:
        >>> _max_memory(["0=20GiB", "cpu=60GB"])
        {0: 21474836480, 'cpu': 60000000000}
    """
    if not entries:
        return None
    limits: dict[int | str, int] = {}
    for entry in entries:
        device, equals, size = entry.partition("=")
        if not (device and equals and size):
            raise UserError(f"--max-memory must look like 0=20GiB or cpu=60GiB, got {entry}")
        limits[int(device) if device.isdigit() else device] = bytes_of(size, f"--max-memory {device}")
    return limits
