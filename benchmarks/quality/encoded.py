"""Pictures encoded before any question, compacted without one: ``python -m benchmarks encoded``.

The same questions and follow-ups as ``python -m benchmarks quality``. Every scene is encoded once a share, then asked about ten
times, without the vision tower; beside that, rules that choose when the question is known. Encoding keeps a share of a picture's
real tiles; the whole encoding holds padding tiles too, so that a picture of few tiles takes less of it than the share says.
Rows that the quality benchmark has measured already, on the same scenes, are taken from its result.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from rich.progress import track

from benchmarks.common.results import environment, read_result, write_result
from benchmarks.common.seeds import seed_everything
from benchmarks.quality.measure import SCENE_SETS, Answers, Row, figures, run_rule, run_stock
from benchmarks.quality.questions import Batch, answer_both, question_batches, scenes_from
from benchmarks.quality.rules import Rule
from benchmarks.small_model.questions import TRAINED_TYPES
from benchmarks.small_model.scenes import Scene
from trim_plugin import KCenter, Pictures, TrimConfig, TrimmedCache, encode_pictures
from trim_plugin.embedded import load_small_model

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
    earlier = read_result("quality", arguments.out)
    known = [] if earlier is None or earlier["scenes"] != count else earlier["rows"]
    result: dict[str, Any] = {
        "environment": environment(),
        "quick": arguments.quick,
        "scenes": count,
        "questions": count * len(TRAINED_TYPES),
        "rows": [],
    }
    for row in _rows(count, arguments.quick, known):
        result["rows"].append(row)
        write_result("encoded", result, arguments.out)
    return result


@dataclasses.dataclass
class _Asked:
    """A set of scenes with the questions about them, stock's answers, and the bytes of the whole encodings."""

    scenes: list[Scene]
    batches: list[Batch]
    stock: list[Answers]
    whole_bytes: int


def _rows(count: int, quick: bool, known: list[Row]) -> Iterator[Row]:
    """Encoded pictures of both sets first, then the rules that know the question."""
    model, processor = load_small_model()
    sets = {}
    for where, seed in SCENE_SETS.items():
        scenes = scenes_from(seed, count, model)
        batches = question_batches(model, scenes, seed)
        stock = run_stock(model, batches)
        whole = sum(encode_pictures(model, processor, [scene.image]).nbytes for scene in scenes)
        sets[where] = _Asked(scenes, batches, stock, whole)
        yield {"where": where, "rule": "stock", "parameter": None} | figures(batches, stock, stock)
    for share, (where, asked) in track([*itertools.product(SHARES[: 2 if quick else None], sets.items())], "encoded"):
        rule = None if share is None else KCenter(share)
        pictures = [encode_pictures(model, processor, [scene.image], rule) for scene in asked.scenes]
        size = round(sum(picture.nbytes for picture in pictures) / asked.whole_bytes, 5)
        found = figures(asked.batches, asked.stock, run_encoded(model, asked.batches, pictures, asked.stock))
        yield {"where": where, "rule": "encoded", "parameter": share, "bytes_of_whole": size} | found
    for one, (where, asked) in track([*itertools.product(KNOWING[: 1 if quick else None], sets.items())], "known"):
        key = {"where": where, "rule": one.family, "parameter": one.parameter}
        row = next((row for row in known if row.items() >= key.items()), None)
        yield row or key | figures(asked.batches, asked.stock, run_rule(model, asked.batches, one, asked.stock))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own: `--scenes` is the quality benchmark's."""
