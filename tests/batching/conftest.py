"""Rows about the small model's scenes."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.small_model.questions import TRAINED_TYPES, ask
from benchmarks.small_model.scenes import LAYOUTS, draw_scene
from trim_plugin.batching.worker import Worker
from trim_plugin.embedded import load_small_model


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


@pytest.fixture(scope="session")
def small():
    return load_small_model()


@pytest.fixture
def worker(small, tmp_path):
    return Worker(*small, {"top_k_ratio": 0.1}, batch_size=8, max_new_tokens=24, folder=tmp_path)
