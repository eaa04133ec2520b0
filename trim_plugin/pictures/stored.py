"""Encoded pictures as a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trim_plugin.durable import draft_of

#: Of the file's metadata: what it is, and how it is laid out. A reader knows all versions up to its own.
KIND, VERSION = "trim_plugin.pictures", 1
TENSORS = ("states", "index", "sizes", "mark")
NUMBERS = ("total", "tiles", "most_tiles", "tile_tokens", "rule")


def write(path: Path, pictures: Any) -> None:
    """Write a `Pictures`; no reader ever sees half of it."""
    tensors = {name: getattr(pictures, name).detach().cpu().contiguous() for name in TENSORS}
    tensors |= {name: tensors[name].to(torch.int32) for name in ("index", "sizes")}
    fields = {name: getattr(pictures, name) for name in (*NUMBERS, "tower_share")}
    metadata = {"kind": KIND, "version": str(VERSION), "pictures": json.dumps(fields)}
    with draft_of(path) as draft:
        save_file(tensors, draft, metadata=metadata)


def read(path: Path, device: str | torch.device) -> dict[str, Any]:
    """The fields of a `Pictures` from a file.

    Raises:
        FileNotFoundError, ValueError: as for `Pictures.load`.

    Example:
        >>> read(Path("nowhere.safetensors"), "cpu")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no such file of encoded pictures: nowhere.safetensors
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file of encoded pictures: {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            _check_kind(path, metadata)
            tensors = {name: file.get_tensor(name) for name in TENSORS}
        fields = json.loads(metadata["pictures"])
        # Files from before pictures could be merged inside the tower say nothing of it.
        numbers = {name: fields[name] for name in NUMBERS} | {"tower_share": fields.get("tower_share")}
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is cut off or damaged ({error}). Encode the pictures again: encode_pictures(...).save(...)."
        ) from None
    _check_shapes(path, tensors, numbers)
    return {
        **numbers,
        "states": tensors["states"],
        "index": tensors["index"].long(),
        "sizes": tensors["sizes"].long(),
        "mark": tensors["mark"].cpu(),
    }


def _check_kind(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("kind") != KIND:
        raise ValueError(
            f"{path} is a safetensors file, but not one of encoded pictures. Pictures.save writes such files."
        )
    version = metadata.get("version", "")
    if not version.isdigit() or int(version) > VERSION:
        raise ValueError(
            f"{path} was written by a later version of trim_plugin (layout {version}, this one knows up to {VERSION}). Upgrade "
            "trim-plugin, or encode the pictures again."
        )


def _check_shapes(path: Path, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
    states, index, sizes = (tensors[name] for name in ("states", "index", "sizes"))
    fits = states.ndim == 2 and index.shape == sizes.shape == states.shape[:1] and len(index) > 0
    fits = fits and len(numbers["tiles"]) * numbers["most_tiles"] * numbers["tile_tokens"] == numbers["total"]
    if not fits or int(index.min()) < 0 or int(index.max()) >= numbers["total"] or int(sizes.min()) < 1:
        raise ValueError(f"{path} is damaged: its tensors don't fit together. Encode the pictures again.")
