"""What a process and a cache hold in memory, and waiting for the device."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import torch

from trim_plugin import TrimmedCache
from trim_plugin.cache.report import held_bytes
from trim_plugin.evaluation.peaks import in_use, peak_bytes, reset_peaks


def synchronize(device: str) -> None:
    """Wait for the GPU, if there is one."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def kv_bytes(model: Any, cache: Any) -> tuple[int, int]:
    """Bytes of cross- and self-attention keys and values that a trimmed cache or stock's holds now."""
    if isinstance(cache, TrimmedCache):
        report = cache.report()
        return report.cross_kv_bytes, report.self_kv_bytes
    crossing = set(model.config.text_config.cross_attention_layers)
    sides: tuple[list[Any], list[Any]] = ([], [])
    for index, layer in enumerate(cache.layers):
        sides[index not in crossing].extend([layer.keys, layer.values])
    return held_bytes(sides[0]), held_bytes(sides[1])


def start_peak(device: str) -> int:
    """Forget the peak so far; returns the bytes in use now: the process's, or all GPUs' allocators'."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        reset_peaks()
        return in_use()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def peak(device: str) -> int:
    """Most bytes in use since `start_peak`."""
    return peak_bytes() if device.startswith("cuda") else _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
