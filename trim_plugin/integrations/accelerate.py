"""One call from a model's name to a model and processor that are ready for the trimmed cache, on whatever devices there are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from trim_plugin.integrations import bitsandbytes as quantization
from trim_plugin.kv_formats import require_bitsandbytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHTS = (*DTYPES, *quantization.PRESETS)


def load(
    path_or_id: str | Path,
    weights: str = "bf16",
    *,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    device_map: str | Mapping[str, int | str | torch.device] | None = "auto",
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    quantize_vision: bool = True,
    attention: str = "sdpa",
    **settings: Any,
) -> tuple[Any, Any]:
    """Load an Mllama model and its processor, ready for `generate(cache_implementation="trimmed")`.

    Everything that can be checked without weights is checked before any is read.

    Args:
        path_or_id: a folder or a hub id.
        weights: "fp32", "bf16", "fp16", or a preset of `integrations.bitsandbytes`: "nf4", "fp4", "int8".
        adapter: LoRA adapters, as for `integrations.peft.load_adapters`; the first is active.
        device_map: as transformers takes it: "auto", "balanced", "sequential", a device, a dict from modules to devices, or
            None for the CPU. Blocks stay whole; parts may go to "cpu" and "disk" and visit the device for their forward.
        max_memory: bytes (or "10GiB") that each device may hold, for "auto" and its kin.
        offload_folder: where parts on "disk" go, if they cannot stay in the checkpoint.
        dtype: with quantized weights, the dtype of everything else and of computing.
        quantize_vision: with quantized weights, whether the vision tower is quantized too.
        attention: "sdpa" or "eager".
        settings: further arguments of `from_pretrained`.

    Returns:
        The model (a `PeftModel` with an adapter) in eval mode, and the processor.

    Raises:
        ValueError: unknown weights, another model than Mllama, an adapter that doesn't fit, a device map that splits a block
            or leaves one out, or quantized weights on disk.
        FileNotFoundError: no such adapter.
        ImportError: quantized weights without bitsandbytes.
        OSError: no such model.

    Example:
        >>> from trim_plugin.embedded import SMALL_MODEL, ask
        >>> model, processor = load(SMALL_MODEL, "nf4")
        >>> output = model.generate(**ask(processor), cache_implementation="trimmed", max_new_tokens=2)
        >>> type(model.model.language_model.layers[1].cross_attn.k_proj).__name__
        'Linear4bit'
    """
    from transformers import AutoConfig, AutoProcessor, MllamaForConditionalGeneration

    if weights not in WEIGHTS:
        raise ValueError(f"Unknown weights {weights!r}. Allowed: {', '.join(map(repr, WEIGHTS))}.")
    quantized = weights in quantization.PRESETS
    if quantized:
        require_bitsandbytes(f"weights={weights!r}")
    config = AutoConfig.from_pretrained(path_or_id)
    if config.model_type != "mllama":
        raise ValueError(f"{path_or_id} is a {config.model_type} model; this needs an Mllama (Llama-3.2-Vision) model.")
    with torch.device("meta"):
        skeleton = MllamaForConditionalGeneration(config)
    if isinstance(device_map, Mapping):
        check_device_map(skeleton, device_map)
        if quantized and "disk" in map(str, device_map.values()):
            raise ValueError(
                f"device_map puts modules on disk, but bitsandbytes' weights={weights!r} cannot be offloaded there. "
                "Use 'cpu', or weights='bf16'."
            )
        device_map = dict(_without_overlap("", skeleton, device_map))
    if adapter is not None:
        from trim_plugin.integrations.peft import load_adapters, read_adapters

        for found in read_adapters(adapter):
            found.check_fits(skeleton)
    if quantized:
        settings.setdefault(
            "quantization_config",
            quantization.quantization_config(weights, quantize_vision=quantize_vision, compute_dtype=dtype),
        )
    model = MllamaForConditionalGeneration.from_pretrained(
        path_or_id,
        dtype=DTYPES.get(weights, dtype),
        device_map=device_map,
        max_memory=None if max_memory is None else dict(max_memory),
        offload_folder=offload_folder,
        attn_implementation=attention,
        **settings,
    ).eval()
    if quantized:
        quantization.use_standard_layout(model, only_misfits=True)
        quantization.repack_for_cpu(model)
    if adapter is not None:
        model = load_adapters(model, adapter)
    return model, AutoProcessor.from_pretrained(path_or_id)


def check_device_map(model: torch.nn.Module, device_map: Mapping[str, int | str | torch.device]) -> None:
    """Raise `ValueError` if a device map splits a block of the model, leaves something out or names what isn't there.

    Blocks are the decoder layers and the vision tower's layers: their residual connections stay on one device.

    Args:
        model: a model; its weights may be on meta.
        device_map: from module names to devices; the longest name that contains a parameter counts, "" is everything.

    Example:
        >>> block = torch.nn.Linear(2, 2)
        >>> block._no_split_modules = ["Linear"]
        >>> check_device_map(block, {"weight": 0, "bias": "cpu"})
        Traceback (most recent call last):
        ...
        ValueError: device_map splits the block '' (Linear): 'weight' is on 0, 'bias' on cpu. Give the whole block one device.
    """
    names = [name for name, _ in model.named_parameters()]
    known = {name for name, _ in model.named_modules()}.union(names, (name for name, _ in model.named_buffers()))
    for entry in device_map:
        if entry not in known:
            raise ValueError(f"device_map names {entry!r}, which the model does not have.")
    places = {name: _placed(name, device_map) for name in names}
    for name, place in places.items():
        if place is None:
            raise ValueError(
                f"device_map leaves out {name!r}. Give it a device, or add a default: '' covers everything."
            )
    kinds = getattr(model, "_no_split_modules", None) or ()
    for block, module in model.named_modules():
        kind = type(module).__name__
        if kind not in kinds:
            continue
        own = {name: str(place) for name, place in places.items() if _inside(name, block)}
        for (first, here), (other, there) in itertools.pairwise(own.items()):
            if here != there:
                raise ValueError(
                    f"device_map splits the block {block!r} ({kind}): {first!r} is on {here}, {other!r} on {there}. "
                    "Give the whole block one device."
                )


def _without_overlap(name: str, module: torch.nn.Module, device_map: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A device map that says the same, but in which no entry contains another: accelerate cannot place nested ones."""
    if not any(entry != name and _inside(entry, name) for entry in device_map):
        yield name, _placed(name, device_map)
        return
    prefix = f"{name}." if name else ""
    for child_name, child in module.named_children():
        yield from _without_overlap(prefix + child_name, child, device_map)
    for own, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        yield prefix + own, _placed(prefix + own, device_map)


def _placed(name: str, device_map: Mapping[str, Any]) -> Any:
    entries = [entry for entry in device_map if _inside(name, entry)]
    return device_map[max(entries, key=len)] if entries else None


def _inside(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")
