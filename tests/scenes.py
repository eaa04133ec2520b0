"""Rows about the small model's scenes, for whatever answers many of them."""

from __future__ import annotations

import numpy as np

from benchmarks.small_model.questions import TRAINED_TYPES, ask
from benchmarks.small_model.scenes import LAYOUTS, draw_scene


def scene_rows(folder, count, seed=0):
    """Rows of one picture each, of all layouts, written to a folder: questions and lists, short and long answers."""
    rows = []
    for number in range(count):
        scene = draw_scene(seed + number, held_out=True, layout=LAYOUTS[number % len(LAYOUTS)])
        name = f"{number}.png"
        scene.image.save(folder / name)
        question, _ = ask(scene, TRAINED_TYPES[number % len(TRAINED_TYPES)], np.random.default_rng(number))
        rows.append({"id": f"row {number}", "images": [name], "question": question})
    return rows
