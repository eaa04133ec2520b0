"""Write the held-out pictures that ship with the package: ``python -m benchmarks.small_model.pictures``.

The answers come from the truth about the scenes, not from the model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.small_model.questions import ask
from benchmarks.small_model.scenes import draw_scene

FOLDER = Path(__file__).parents[2] / "trim_plugin" / "assets" / "pictures"

# name, seed, layout, digits, enlargement, questions
PICTURES = (
    ("2x2.png", 900_001, (2, 2), 6, 1.0, ("colour", "list")),
    ("1x1.png", 900_002, (1, 1), 3, 1.0, ("list",)),
    ("1x2.png", 900_003, (1, 2), 4, 1.0, ("find",)),
    ("3x1.png", 900_004, (3, 1), 5, 1.0, ("count",)),
    ("1x4.png", 900_005, (1, 4), 7, 1.0, ("total", "list")),
    ("large.png", 900_006, (2, 2), 5, 3.0, ("colour", "list")),
)


def write_pictures(folder: Path) -> None:
    """Write the PNG files and ``questions.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, seed, layout, count, upscale, kinds in PICTURES:
        scene = draw_scene(seed, held_out=True, layout=layout, count=count, upscale=upscale)
        scene.image.save(folder / name, optimize=True)
        for kind in kinds:
            question, answer = ask(scene, kind, np.random.default_rng([seed, 1]))
            entries.append({"picture": name, "question": question, "answer": answer})
    (folder / "questions.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the shipped held-out pictures.")
    parser.add_argument("--out", type=Path, default=FOLDER)
    write_pictures(parser.parse_args().out)


if __name__ == "__main__":
    main()
