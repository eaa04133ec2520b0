"""Pictures encoded before any question, compacted without one: ``python -m benchmarks encoded``.

The same questions and follow-ups as ``python -m benchmarks quality``. Every scene is encoded once a share, then asked about ten
times, without the vision tower; beside that, rules that choose when the question is known. Encoding keeps a share of a picture's
real tiles; the whole encoding holds padding tiles too, so that a picture of few tiles takes less of it than the share says.
Rows that the quality benchmark has measured already, on the same scenes, are taken from its result.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks.common.results import environment, read_result, write_result
from benchmarks.common.seeds import seed_everything
from benchmarks.quality.measure import (
    SCENE_SETS,
    Answers,
    Known,
    Row,
    figures,
    run_rule,
    run_stock,
)
from benchmarks.quality.questions import Batch, answer_both, question_batches, scenes_from
from benchmarks.quality.rules import Rule
from benchmarks.small_model.tasks import folder_of, model_name, result_name, task_of
from trim_plugin import KCenter, Pictures, TrimConfig, TrimmedCache, encode_pictures
from trim_plugin.embedded import SMALL_MODEL
from trim_plugin.integrations.accelerate import load

#: What matters most comes first: a run that is cut off has it. None is whole.
SHARES = (0.25, 0.1, None, 0.5, 0.15, 0.07, 0.05)
#: Rules that choose when the question is known. The paper's ratios keep 62, 24 and 15 % on this model.
KNOWING = [
    *(Rule("k-center, merged", share, {"processors": [KCenter(share)]}) for share in (0.25, 0.1, 0.05)),
    *(Rule("paper, merged", ratio, {"top_k_ratio": ratio}) for ratio in (0.25, 0.1, 0.05)),
]


def run_encoded(model: Any, batches: list[Batch], pictures: list[Pictures], stock: list[Answers]) -> list[Answers]:
    """Answers on encoded scenes; the second question follows stock's first answer, as in `run_rule`."""
    found = []
    for batch, reference in zip(batches, stock, strict=True):
        inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "cross_attention_states"}
        own = [pictures[scene] for scene in batch.scenes]
        cache = TrimmedCache(model, TrimConfig(top_k_ratio=1.0), pictures=own)
        answers = answer_both(model, dataclasses.replace(batch, inputs=inputs), cache, reference.first)
        report = cache.report()
        shares = [kept / seen for kept, seen in zip(report.kept_tokens, report.visible_tokens, strict=True)]
        found.append(Answers(*answers, shares, report.cross_kv_bytes, report.stock_cross_kv_bytes))
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, write and return the result."""
    seed_everything()
    count = 24 if arguments.quick else arguments.scenes
    folder = folder_of(arguments.model or SMALL_MODEL)
    name = result_name("encoded", folder)
    known: Known = {}
    for source in (result_name("quality", folder), name)[: 2 if arguments.resume else 1]:
        earlier = read_result(source, arguments.out) or {"scenes": None}
        if earlier["scenes"] == count:
            known |= {(row["where"], row["rule"], row["parameter"]): row for row in earlier["rows"]}
    result: dict[str, Any] = {
        "environment": environment(),
        "quick": arguments.quick,
        "model": model_name(folder),
        "scenes": count,
        "questions": count * len(task_of(folder).types),
        "rows": [],
    }
    sets = {where: _Asked(folder, seed, count) for where, seed in SCENE_SETS.items()}
    for rule, (where, asked) in track([*itertools.product(_wanted(arguments.quick), sets.items())], "encoded"):
        key = {"where": where, "rule": rule.family, "parameter": rule.parameter}
        result["rows"].append(known.get(tuple(key.values())) or key | asked.row(rule))
        write_result(name, result, arguments.out)
    return result


def _wanted(quick: bool) -> list[Rule]:
    """Stock, encoded pictures of every share, then the rules that know the question."""
    encoded = [Rule("encoded", share, {}) for share in SHARES]
    return [Rule("stock", None, {}), *encoded[: 2 if quick else None], *KNOWING[: 1 if quick else None]]


class _Asked:
    """A set of scenes with the questions about them and stock's answers, made when the first rule is measured."""

    def __init__(self, folder: Path, seed: int, count: int) -> None:
        self._folder, self._seed, self._count = folder, seed, count

    @functools.cached_property
    def _ready(self) -> tuple[Any, Any, list[Any], list[Batch], list[Answers]]:
        model, processor = load(self._folder, "fp32", device_map=None, dtype=torch.float32)
        task = task_of(self._folder)
        scenes = scenes_from(self._seed, self._count, model, task)
        batches = question_batches(model, scenes, self._seed, task=task)
        return model, processor, scenes, batches, run_stock(model, batches)

    @functools.cached_property
    def _whole_bytes(self) -> int:
        model, processor, scenes, *_ = self._ready
        return sum(encode_pictures(model, processor, [scene.image]).nbytes for scene in scenes)

    def row(self, rule: Rule) -> Row:
        """What a rule's answers are worth."""
        model, processor, scenes, batches, stock = self._ready
        if rule.family == "stock":
            return figures(batches, stock, stock)
        if rule.family != "encoded":
            return figures(batches, stock, run_rule(model, batches, rule, stock))
        chosen = None if rule.parameter is None else KCenter(rule.parameter)
        pictures = [encode_pictures(model, processor, [scene.image], chosen) for scene in scenes]
        size = sum(picture.nbytes for picture in pictures) / self._whole_bytes
        found = figures(batches, stock, run_encoded(model, batches, pictures, stock))
        return {"bytes_of_whole": round(size, 5)} | found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own: `--scenes`, `--model` and `--resume` are the quality benchmark's."""
