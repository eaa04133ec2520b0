"""How well a small trained model answers with few visual tokens: ``python -m benchmarks quality``.

Every rule answers the same held-out questions, and a second one in the same conversation, about digits that training never saw.
Accuracy means that the whole answer is right, agreement that it is stock's, word for word. Scenes are resampled for the
intervals, since questions about one scene go together. All of it is done twice: on the scenes of earlier tables, and on scenes
that nothing was chosen on. Another model is given by name, ``--model fine``, and asked about what it was trained for.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks.common.decoding import stock_cache
from benchmarks.common.intervals import bootstrap
from benchmarks.common.results import environment, read_result, write_result
from benchmarks.common.seeds import seed_everything
from benchmarks.quality import rules
from benchmarks.quality.conditions import conditions, load_model
from benchmarks.quality.questions import Batch, answer_both, question_batches, scenes_from
from benchmarks.quality.rules import Rule
from benchmarks.small_model.tasks import DIGITS, Task, folder_of, model_name, result_name, task_of
from trim_plugin import TrimConfig, TrimmedCache
from trim_plugin.embedded import SMALL_MODEL

Row = dict[str, Any]
#: What was measured earlier: where, rule and parameter → the row.
Known = dict[tuple[str, str, float | None], Row]

#: Scene sets and their first seeds. Rules are tried on others first, from 600,000,000 on.
SCENE_SETS = {"evaluation": 500_000_000, "fresh": 700_000_000}


@dataclasses.dataclass
class Answers:
    """Of one batch: answers to both questions, the kept share of every sample, and cross KV bytes beside stock's."""

    first: list[list[int]]
    second: list[list[int]]
    kept: list[float]
    bytes: int = 1
    stock_bytes: int = 1


def run_stock(model: Any, batches: list[Batch]) -> list[Answers]:
    """Stock's answers: the reference."""
    return [
        Answers(*answer_both(model, batch, stock_cache(model), None), kept=[1.0] * len(batch.scenes))
        for batch in batches
    ]


def run_rule(model: Any, batches: list[Batch], rule: Rule, stock: list[Answers]) -> list[Answers]:
    """A rule's answers. The second question follows stock's first answer, so that it tells what the cache still knows."""
    found = []
    for batch, reference in zip(batches, stock, strict=True):
        with rule.context():
            cache = TrimmedCache(model, TrimConfig(**rule.settings))
            first, second = answer_both(model, batch, cache, reference.first)
        report = cache.report()
        shares = [kept / seen for kept, seen in zip(report.kept_tokens, report.visible_tokens, strict=True)]
        found.append(Answers(first, second, shares, report.cross_kv_bytes, report.stock_cross_kv_bytes))
    return found


def figures(batches: list[Batch], stock: list[Answers], found: list[Answers]) -> dict[str, Any]:
    """Kept share, accuracy and agreement of one rule, with 95 % intervals; those of follow-ups under their own name."""
    owner = np.array([scene for batch in batches for scene in batch.scenes])
    kinds = np.array([batch.kind for batch in batches for _ in batch.scenes])
    first = _marks(
        [answer for batch in batches for answer in batch.answers],
        [answer for part in stock for answer in part.first],
        [answer for part in found for answer in part.first],
    )
    second = _marks(
        [answer for batch in batches for answer in batch.follow_up_answers],
        [answer for part in stock for answer in part.second],
        [answer for part in found for answer in part.second],
    )
    return {
        "questions": len(owner),
        "kept_share": _rounded(np.mean([share for part in found for share in part.kept])),
        "cross_kv_ratio": _rounded(sum(part.bytes for part in found) / sum(part.stock_bytes for part in found)),
        **_summary(first, owner),
        "follow_up": _summary(second, owner),
        "accuracy_by_type": {kind: _rounded(first[kinds == kind, 0].mean()) for kind in dict.fromkeys(kinds.tolist())},
        "by_type": {
            kind: _summary(first[kinds == kind], owner[kinds == kind]) for kind in dict.fromkeys(kinds.tolist())
        },
    }


def _marks(truth: list[list[int]], stock: list[list[int]], ours: list[list[int]]) -> np.ndarray:
    """(questions, 3): is the answer right, is it stock's, and how much better than stock's."""
    right = np.array([a == b for a, b in zip(ours, truth, strict=True)], float)
    same = np.array([a == b for a, b in zip(ours, stock, strict=True)], float)
    return np.stack([right, same, right - np.array([a == b for a, b in zip(stock, truth, strict=True)])], axis=1)


def _summary(marks: np.ndarray, owner: np.ndarray) -> dict[str, Any]:
    by_scene = np.zeros((owner.max() + 1, 3))
    np.add.at(by_scene, owner, marks)
    by_scene /= len(marks) / len(by_scene)  # every scene has as many questions
    found: dict[str, Any] = {}
    for column, name in enumerate(("accuracy", "agreement", "change")):
        found[name] = _rounded(by_scene[:, column].mean())
        found[f"{name}_interval"] = [
            _rounded(end) for end in bootstrap(by_scene[:, column], lambda drawn: drawn.mean())
        ]
    return found


def _rounded(value: Any) -> float:
    return round(float(value), 5)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, write and return the result."""
    if arguments.positions:
        from benchmarks.quality import positions

        return positions.run(arguments)
    seed_everything()
    count = 24 if arguments.quick else arguments.scenes
    folder = folder_of(arguments.model or SMALL_MODEL)
    task = task_of(folder)
    name = result_name("quality", folder)
    training = folder / "training.json"
    earlier = read_result(name, arguments.out) if arguments.resume else None
    result: dict[str, Any] = {
        "environment": environment(),
        "quick": arguments.quick,
        "model": model_name(folder),
        "training": json.loads(training.read_text(encoding="utf-8")) if training.exists() else None,
        "scenes": count,
        "questions": count * len(task.types),
        "rows": [],
    }
    known = {}
    if earlier is not None and earlier["scenes"] == count:
        known = {(row["where"], row["rule"], row["parameter"]): row for row in earlier["rows"]}
    for row in _rows(folder, count, arguments, known):
        result["rows"].append(row)
        # After every rule: a long run that is cut off leaves what it has, and goes on with --resume.
        write_result(name, result | {"rows": result["rows"] + _rest(known, result["rows"])}, arguments.out)
    return result


def _rest(known: Known, rows: list[Row]) -> list[Row]:
    done = {(row["where"], row["rule"], row["parameter"]) for row in rows}
    return [row for key, row in known.items() if key not in done]


def _rows(folder: Path, count: int, arguments: argparse.Namespace, known: Known) -> Iterator[Row]:
    """One row a rule: of the scene sets, then of the conditions, most of which have half as many scenes."""
    task = task_of(folder)
    for name, seed in SCENE_SETS.items():
        model = functools.partial(load_model, folder)
        yield from _rows_of(name, model, count, seed, rules.all_rules(arguments.quick), known, task)
    for condition in conditions(arguments.adapter)[:: 3 if arguments.quick else 1]:
        adapter = arguments.adapter if condition.adapted else None
        model = functools.partial(load_model, folder, condition.weights, adapter, condition.tower_whole)
        if not condition.everywhere:
            yield from _rows_of(condition.name, model, count // 2, SCENE_SETS["fresh"], condition.rules(), known, task)
            continue
        for name, seed in SCENE_SETS.items():
            where = condition.name if name == "fresh" else f"{condition.name}, {name}"
            yield from _rows_of(where, model, count, seed, condition.rules(), known, task)


def _rows_of(
    where: str,
    load: Callable[[], Any],
    count: int,
    seed: int,
    chosen: list[Rule],
    known: Known,
    task: Task = DIGITS,
) -> Iterator[Row]:
    """Rows of stock and of every rule; those that an earlier run has measured are taken from it."""
    missing = [rule for rule in chosen if (where, rule.family, rule.parameter) not in known]
    yield from (row for (place, *_), row in known.items() if place == where)
    if not missing:
        return
    model = load()
    batches = question_batches(model, scenes_from(seed, count, model, task), seed, task=task)
    stock = run_stock(model, batches)
    if (where, "stock", None) not in known:
        yield {"where": where, "rule": "stock", "parameter": None} | figures(batches, stock, stock)
    for rule in track(missing, f"quality: {where}"):
        found = run_rule(model, batches, rule, stock)
        yield {"where": where, "rule": rule.family, "parameter": rule.parameter} | figures(batches, stock, found)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument(
        "--scenes", type=int, default=400, help="held-out scenes of each set; five questions about each"
    )
    parser.add_argument(
        "--model", help='another model that benchmarks/small_model has trained: "fine", "pages", or its folder'
    )
    parser.add_argument(
        "--positions", action="store_true", help="quality: long answers token by token instead, chosen once and anew"
    )
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run of the same size ended")
    parser.add_argument("--adapter", type=Path, help="a LoRA adapter of the model, to be measured too")
