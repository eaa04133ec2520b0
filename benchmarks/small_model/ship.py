"""Put a trained checkpoint and a few held-out pictures into the package: ``python -m benchmarks.small_model.ship CHECKPOINT``.

The answers in ``questions.json`` are the truth about the scenes, not what the model says.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np

from benchmarks.common.results import write_json
from benchmarks.small_model.questions import ask
from benchmarks.small_model.scenes import draw_scene

ASSETS = Path(__file__).parents[2] / "trim_plugin" / "assets"

#: (layout, digits, enlargement, question type): all numbers of tiles, one picture of photo size
PICTURES = (
    ((1, 1), 3, 1.0, "colour"),
    ((1, 2), 5, 1.0, "count"),
    ((2, 1), 4, 1.0, "find"),
    ((1, 3), 6, 1.0, "total"),
    ((2, 2), 7, 8.0, "colour"),
    ((4, 1), 4, 1.0, "list"),
)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Ship a checkpoint of the small Mllama with the package.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--seed", type=int, default=77_000, help="seed of the first picture")
    args = parser.parse_args(arguments)
    model = ASSETS / "small_model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(args.checkpoint, model)
    folder = ASSETS / "pictures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    entries = []
    for number, (layout, count, upscale, kind) in enumerate(PICTURES):
        scene = draw_scene(args.seed + number, held_out=True, layout=layout, count=count, upscale=upscale)
        name = f"digits-{layout[0]}x{layout[1]}.png"
        scene.image.save(folder / name)
        question, answer = ask(scene, kind, np.random.default_rng([args.seed, number]))
        entries.append({"picture": name, "question": question, "answer": answer})
    write_json(folder / "questions.json", entries)


if __name__ == "__main__":
    main()
