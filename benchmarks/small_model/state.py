"""What a training run must remember to go on as if it had never stopped: written as safetensors and JSON.

Random numbers are not part of it: after the first weights none are drawn but those of the scenes, whose batches are numbered.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


@dataclass
class Progress:
    """Where a run is. Batches are numbered, so the step is the position in the data as well."""

    stage: int = 0
    step: int = 0
    """Steps done of the stage."""
    plateau: int | None = None
    """Step of the stage at which it stopped getting better."""
    seconds: float = 0.0
    """Time spent in the stage."""
    smooth: dict[str, float] = field(default_factory=dict)
    """Running means of loss and shares."""
    window: list[float] = field(default_factory=list)
    """Sum of the watched share in the current window, and its mean in the one before."""
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    """Record of every stage: steps, minutes, running means."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """The learning curve: running means every few steps."""


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A fresh folder to write into, which takes the place of ``folder`` only when everything is written."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def save_state(
    folder: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write weights, the optimizer's moments and the progress into ``folder``."""
    tensors = {
        f"{name}/{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()
    }
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{key}": tensor for key, tensor in moments.items()}
    with replaced(folder) as fresh:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, fresh / "state.safetensors")
        (fresh / "progress.json").write_text(json.dumps(asdict(progress)) + "\n", encoding="utf-8")


def load_progress(folder: Path) -> Progress | None:
    """The progress that ``folder`` holds, or None if there is none."""
    recover(folder)
    path = folder / "progress.json"
    return Progress(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def recover(folder: Path) -> None:
    """Put back the former folder if a run was killed between the two renames of :func:`replaced`."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        os.replace(old, folder)


def load_weights(folder: Path, modules: dict[str, nn.Module]) -> None:
    """Fill the modules from ``folder``."""
    tensors = load_file(folder / "state.safetensors")
    for name, module in modules.items():
        prefix = f"{name}/"
        module.load_state_dict(
            {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        )


def load_moments(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimizer's moments from ``folder``; it must hold the same parameters as when they were written."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "state.safetensors").items():
        if key.startswith("optimizer/"):
            _, number, name = key.split("/")
            state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
