"""The results' files: what was measured, and where and with what."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import trim_plugin
from benchmarks.common.seeds import SEED

RESULTS = Path(__file__).parents[1] / "results"


def environment(device: str = "cpu") -> dict[str, Any]:
    """Where and with what the figures were measured."""
    packages = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name in ("bitsandbytes", "peft"):
        try:
            packages[name] = __import__("importlib.metadata", fromlist=["version"]).version(name)
        except ModuleNotFoundError:
            packages[name] = None
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "trim_plugin": trim_plugin.__version__,
        "python": platform.python_version(),
        **packages,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "seed": SEED,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a benchmark's result as JSON; returns the file."""
    return write_json(folder / f"{name}.json", result)


def write_json(path: Path, content: Any) -> Path:
    """Write JSON that diffs well; returns the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def read_result(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """A benchmark's result, or None if it was never run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
