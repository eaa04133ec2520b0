"""How well a trained model answers when its vision tower runs on fewer patches: ``python -m benchmarks tower``.

Pictures of one tile and of four are asked about apart, since padding is three quarters of the one and none of the other. Scenes
are drawn, from a seed that nothing was chosen on, until there are enough of each. Behind the tower everything is kept, or a
share by k-center, as in ``python -m benchmarks quality``. Arithmetic is counted for the model's own tower and for the 11B one.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from typing import Any

from rich.progress import track

from benchmarks.common.arithmetic import tower_operations
from benchmarks.common.results import environment, write_result
from benchmarks.common.seeds import seed_everything
from benchmarks.quality.conditions import load_model
from benchmarks.quality.measure import figures, run_rule, run_stock
from benchmarks.quality.questions import Batch, question_batches, scenes_from, visual_states
from benchmarks.quality.rules import Rule
from benchmarks.small_model.batches import image_inputs
from benchmarks.small_model.tasks import DIGITS, Task, folder_of, model_name, result_name, task_of
from trim_plugin import KCenter
from trim_plugin.embedded import SMALL_MODEL
from trim_plugin.planning.configuration import built_in_config

#: Beyond the scenes of the tables of rules, which are the first of theirs; nothing was tried on these.
SEED = 900_000_000
TILES = (1, 4)
SHARES = (0.6, 0.75, 0.5, 0.4)
BEHIND = (
    Rule("everything", 1.0, {"top_k_ratio": 1.0}),
    Rule("k-center, merged", 0.25, {"processors": [KCenter(0.25)]}),
    Rule("k-center, merged", 0.1, {"processors": [KCenter(0.1)]}),
)


def scenes_of(tiles: int, count: int, model: Any, task: Task = DIGITS) -> list[Any]:
    """The first scenes from `SEED` on whose pictures take so many tiles."""
    size, found = model.config.vision_config.image_size, []
    for first in itertools.count(SEED):
        (scene,) = scenes_from(first, 1, model, task)
        if int(image_inputs([scene.image], size)["aspect_ratio_mask"].sum()) == tiles:
            found.append(scene)
        if len(found) == count:
            break
    return found


def with_share(model: Any, batches: list[Batch], scenes: list[Any], share: float | None) -> list[Batch]:
    """The same questions about what a tower with this share yields; it runs once for all questions about the same scenes."""
    known: dict[tuple[int, ...], Any] = {}
    found = []
    for batch in batches:
        numbers = tuple(batch.scenes)
        if numbers not in known:
            pixels = image_inputs([scenes[number].image for number in numbers], model.config.vision_config.image_size)
            known[numbers] = visual_states(model, pixels, share)
        found.append(dataclasses.replace(batch, inputs=batch.inputs | {"cross_attention_states": known[numbers]}))
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, write and return the result."""
    seed_everything()
    count = 12 if arguments.quick else arguments.scenes
    folder = folder_of(arguments.model or SMALL_MODEL)
    task = task_of(folder)
    model = load_model(folder)
    vision, whole = model.config.vision_config, built_in_config("11b").vision_config
    rows: list[dict[str, Any]] = []
    result = {
        "environment": environment(),
        "quick": arguments.quick,
        "model": model_name(folder),
        "scenes": count,
        "questions": count * len(task.types),
        "rows": rows,
    }
    name = result_name("tower_quality", folder)
    shares = (None, *SHARES[: 1 if arguments.quick else None])
    for tiles in TILES:
        scenes = scenes_of(tiles, count, model, task)
        batches = question_batches(model, scenes, SEED, task=task)
        stock = run_stock(model, batches)
        for share in track(shares, f"tower: {tiles} tiles"):
            seen = with_share(model, batches, scenes, share)
            for rule in BEHIND:
                rows.append(
                    {
                        "tiles": tiles,
                        "tower_share": share,
                        "rule": rule.family,
                        "parameter": rule.parameter,
                        "by_arithmetic": tower_operations(vision) / tower_operations(vision, tiles, share),
                        "by_arithmetic_11b": tower_operations(whole) / tower_operations(whole, tiles, share),
                    }
                    | figures(batches, stock, run_rule(model, seen, rule, stock))
                )
                write_result(name, result, arguments.out)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own: `--scenes` and `--model` are the quality benchmark's."""
