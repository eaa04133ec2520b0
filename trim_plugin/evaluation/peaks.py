"""The most memory that was in use, on all GPUs together: a model may be split over several."""

from __future__ import annotations

import torch


def reset_peaks() -> None:
    """Forget the peaks so far, of every GPU."""
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)


def in_use() -> int:
    """Bytes that tensors take now, on all GPUs together."""
    return sum(torch.cuda.memory_allocated(device) for device in range(torch.cuda.device_count()))


def peak_bytes() -> int:
    """The sum of every GPU's peak since `reset_peaks`. At no time was more in use at once."""
    return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
