"""How many pictures one `generate` shall answer, from the planner's figures and the memory at hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from trim_plugin.config import TrimConfig
from trim_plugin.planning.fitting import largest_fit
from trim_plugin.planning.job import Job
from trim_plugin.planning.model_sizes import weight_bytes
from trim_plugin.planning.planner import Way, expected_kept_share

#: Larger batches gain nothing: where the vision tower's arithmetic is the bound, which on a CPU is soon.
MOST_PICTURES = {"cpu": 16, "other": 256}
#: Of the memory at hand. The working set is an estimate, and fragments of freed blocks stay behind.
SHARE = 0.8


def pictures_at_a_time(model: Any, config: TrimConfig, new_tokens: int, prompt_tokens: int = 256) -> int:
    """Most pictures that one `generate` with a trimmed cache shall read, at least 1.

    Args:
        model: an Mllama model with its weights in place.
        config: of the trimmed cache. What other rules than the paper's keep is not known beforehand: everything is assumed.
        new_tokens: longest answer.
        prompt_tokens: text tokens of a prompt.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> pictures_at_a_time(load_small_model()[0], TrimConfig(), new_tokens=32)
        16
    """
    device = model.device.type
    most = MOST_PICTURES["cpu" if device == "cpu" else "other"]
    job = Job(
        tiles=int(model.config.vision_config.max_num_tiles),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        pixels_on_device=True,
    )
    share = 1.0 if config.top_k_ratio is None else expected_kept_share(config.top_k_ratio)
    way = Way("trimmed", share, kv_quantization=config.kv_quantization, prefill_pictures=config.prefill_pictures)
    weights = "fp32" if model.dtype == torch.float32 else "bf16"
    # The planner counts the weights, which are in place already.
    memory = int(SHARE * free_memory(model.device)) + sum(weight_bytes(model.config, weights).values())
    fit = largest_fit(model.config, job, way, memory, weights=weights, reserve=0)
    return max(1, min(most, fit.largest_batch))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device.

    Example:
        >>> free_memory(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _free_on_host()


def _free_on_host() -> int:
    limits = []
    meminfo, group, used = (
        Path(name) for name in ("/proc/meminfo", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")
    )
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
    if group.is_file() and used.is_file() and group.read_text().strip().isdigit():
        limits.append(max(0, int(group.read_text()) - int(used.read_text())))
    if not limits:
        # Not Linux: half of all memory, which is what can be had where the system does not say more.
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4 * 2**30
        limits.append(pages // 2)
    return min(limits)
