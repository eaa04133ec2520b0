"""Encoded pictures as a safetensors file, with a checksum: what is read is what was written, or an error says so.

A file is read into memory as a whole and never mapped: what happens to it afterwards changes nothing that was loaded.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from trim_plugin.arithmetic import checked_share
from trim_plugin.durable import draft_of, open_regular

#: Of the file's metadata: what it is, and how it is laid out.
KIND, VERSION = "trim_plugin.pictures", 3
#: Names of the tensors, and the dtypes that they may have in a file, by safetensors' names.
TENSORS: dict[str, dict[str, torch.dtype]] = {
    "index": {"I32": torch.int32},
    "sizes": {"I32": torch.int32},
    "mark": {"F32": torch.float32},
    "states": {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64},
}
NUMBERS = ("total", "tiles", "most_tiles", "tile_tokens", "rule")
#: A header is read before anything is known of a file. Those of this package take a few kilobytes.
_MOST_HEADER = 1 << 24
_MOST = 2**48
AGAIN = "Encode the pictures again: encode_pictures(...).save(...)."


def write(path: Path, pictures: Any) -> None:
    """Write a `Pictures`; no reader ever sees half of it."""
    tensors = {name: getattr(pictures, name).detach().cpu().contiguous() for name in TENSORS}
    tensors |= {name: tensors[name].to(torch.int32) for name in ("index", "sizes")}
    fields = json.dumps({name: getattr(pictures, name) for name in (*NUMBERS, "tower_share")})
    metadata = {"kind": KIND, "version": str(VERSION), "pictures": fields, "checksum": _checksum(fields, tensors)}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _name_of(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    # By hand, since safetensors writes a file of its own beside the draft, which stays behind if the process is killed.
    with draft_of(path) as draft, draft.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            file.write(_bytes(tensor))


def read(path: Path, device: str | torch.device) -> dict[str, Any]:
    """The fields of a `Pictures` from a file.

    Raises:
        OSError, ValueError: as for `Pictures.load`.

    Example:
        >>> read(Path("nowhere.safetensors"), "cpu")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no such file of encoded pictures: nowhere.safetensors
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file of encoded pictures: {path}") from None
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}. Give a file that Pictures.save wrote.") from None
    with file:
        try:
            header = _header(file)
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"it does not begin as a safetensors file does: {_short(error)}") from None
        metadata: Any = header.get("__metadata__")
        _check_kind(path, metadata if isinstance(metadata, dict) else {})
        try:
            tensors = _tensors(file)
            fields = metadata["pictures"]
            if metadata["checksum"] != _checksum(fields, tensors):
                raise ValueError("its bytes are not those that were written: the checksum differs")
            numbers = _numbers(json.loads(fields))
        except (SafetensorError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
            raise _damaged(path, _short(error)) from None
    _check_fit(path, tensors, numbers)
    return {
        **numbers,
        "states": tensors["states"].to(device),
        "index": tensors["index"].to(device).long(),
        "sizes": tensors["sizes"].to(device).long(),
        "mark": tensors["mark"],
    }


def _header(file: BinaryIO) -> dict[str, Any]:
    """What stands in front of the tensors' bytes."""
    length = int.from_bytes(file.read(8), "little")
    if length > _MOST_HEADER:
        raise ValueError("its header would be longer than any")
    data = file.read(length)
    if length == 0 or len(data) < length:
        raise ValueError("its header is cut off")
    header = json.loads(data)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header


def _check_kind(path: Path, metadata: Mapping[str, Any]) -> None:
    if metadata.get("kind") != KIND:
        raise ValueError(
            f"{path} is a safetensors file, but not one of encoded pictures. Pictures.save writes such files."
        )
    version = metadata.get("version")
    if not isinstance(version, str) or not (version.isascii() and version.isdigit()) or not version.strip("0"):
        raise _damaged(path, "its version is no number")
    if len(version) > 9 or int(version) > VERSION:
        raise ValueError(
            f"{path} was written by a later version of trim_plugin (layout {version[:20]}, this one knows {VERSION}). Upgrade "
            "trim-plugin, or encode the pictures again."
        )
    if int(version) < VERSION:
        raise ValueError(
            f"{path} was written by an earlier version of trim_plugin (layout {version}), whose files don't tell "
            f"all of what shaped the pictures. {AGAIN}"
        )


def _tensors(file: BinaryIO) -> dict[str, torch.Tensor]:
    """The tensors, in memory that nobody else has."""
    file.seek(0)
    tensors = load(file.read())
    for name, dtypes in TENSORS.items():
        if tensors[name].dtype not in dtypes.values():
            raise ValueError(f"{name} has a dtype that it cannot have")
    return tensors


def _numbers(fields: Any) -> dict[str, Any]:
    """The fields that are no tensors, each checked for itself."""
    numbers = {name: fields[name] for name in (*NUMBERS, "tower_share")}
    tiles = numbers["tiles"]
    counts = [numbers[name] for name in ("total", "most_tiles", "tile_tokens")]
    fits = isinstance(tiles, list) and all(_is_count(number) and number > 0 for number in (*counts, *tiles))
    fits = fits and bool(tiles) and max(tiles) <= numbers["most_tiles"] and isinstance(numbers["rule"], str)
    if not fits:
        raise ValueError("a field has a value that is not allowed")
    checked_share(numbers["tower_share"])
    return numbers


def _check_fit(path: Path, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
    states, index, sizes = (tensors[name] for name in ("states", "index", "sizes"))
    fits = states.ndim == tensors["mark"].ndim == 2 and index.shape == sizes.shape == states.shape[:1]
    fits = fits and len(numbers["tiles"]) * numbers["most_tiles"] * numbers["tile_tokens"] == numbers["total"]
    fits = fits and len(index) > 0 and bool((index[1:] > index[:-1]).all())
    if not fits or int(index[0]) < 0 or int(index[-1]) >= numbers["total"] or int(sizes.min()) < 1:
        raise ValueError(f"{path} is damaged: its tensors don't fit together. {AGAIN}")


def _checksum(fields: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of all that a file holds, however it is laid out there."""
    value = zlib.crc32(fields.encode())
    for name in TENSORS:
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {_name_of(tensor.dtype)} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(_bytes(tensor), value)
    return f"{value:08x}"


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def _name_of(dtype: torch.dtype) -> str:
    """safetensors' name of a dtype."""
    return next(name for names in TENSORS.values() for name, known in names.items() if known == dtype)


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= _MOST


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is cut off or damaged ({why}). {AGAIN}")


def _short(error: BaseException) -> str:
    """An error in one short line that can be printed, whatever stands in a damaged file."""
    said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return ascii(said)[1:-1][:200] or type(error).__name__
