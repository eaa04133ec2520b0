"""Put a trained model and its curve beside the benchmarks: ``python -m benchmarks.small_model.publish RUN --model pages``.

``RUN`` is the folder that ``train --out`` wrote. Afterwards ``evaluate`` writes the tables.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.common.figures import save
from benchmarks.common.results import write_json
from benchmarks.small_model.state import load_progress
from benchmarks.small_model.tasks import FOLDERS

MOST_BYTES = 10_000_000


def draw_curve(curve: list[dict[str, Any]], path: Path) -> Path:
    """The shares of right answer tokens and patches over the minutes of training, stage by stage."""
    figure, axes = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    offset, borders = 0.0, []
    minutes: list[float] = []
    for number, point in enumerate(curve):
        if number and point["stage"] != curve[number - 1]["stage"]:
            offset = minutes[-1]
            borders.append((offset, point["stage"]))
        minutes.append(offset + point["minutes"])
    for key, title in (("words", "answer tokens right"), ("patches", "patches named right")):
        points = [(x, point[key]) for x, point in zip(minutes, curve, strict=True) if key in point]
        axes.plot(*zip(*points, strict=True), label=title)
    for x, stage in [(0.0, curve[0]["stage"]), *borders]:
        axes.axvline(x, color="0.7", linewidth=0.8)
        axes.text(x, 1.01, f" {stage}", fontsize=8, color="0.4")
    axes.set(xlabel="minutes of training", ylim=(0, 1), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    return save(figure, path)


def publish(run: Path, folder: Path) -> None:
    """Copy the checkpoint of a run into ``folder/model``, and write ``results/curve.json`` and ``results/curve.png``.

    Raises:
        FileNotFoundError: ``run`` holds no training run.
        ValueError: the weights are too large for a repository.
    """
    progress = load_progress(run / "state")
    if progress is None:
        raise FileNotFoundError(f"{run} holds no training run: give the folder that train --out wrote.")
    size = (run / "checkpoint" / "model.safetensors").stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"the weights have {size:,} bytes, more than {MOST_BYTES:,}")
    shutil.rmtree(folder / "model", ignore_errors=True)
    shutil.copytree(run / "checkpoint", folder / "model")
    (folder / "model" / "model.safetensors").chmod(0o644)
    write_json(folder / "results" / "curve.json", progress.curve)
    draw_curve(progress.curve, folder / "results" / "curve.png")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Put a trained model beside the benchmarks.")
    parser.add_argument("run", type=Path, help="the folder that train --out wrote")
    parser.add_argument("--model", choices=list(FOLDERS), default="fine", help="which model it is")
    args = parser.parse_args(arguments)
    publish(args.run, FOLDERS[args.model].parent)


if __name__ == "__main__":
    main()
