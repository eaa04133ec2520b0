"""How well the small trained model answers with few visual tokens: ``python -m benchmarks quality``.

Every rule answers the same held-out questions, with digits that training never saw. Accuracy means that the whole answer is
right, agreement that it is stock's, word for word. Scenes are resampled for the intervals, since questions about one scene go
together.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.common.decoding import Decoding, stock_cache
from benchmarks.common.given_share import EvenlySpaced
from benchmarks.common.intervals import bootstrap
from benchmarks.common.results import environment, write_result
from benchmarks.common.seeds import SEED, seed_everything
from benchmarks.quality import rules
from benchmarks.small_model.architecture import build_tokenizer, prompt_ids
from benchmarks.small_model.batches import image_inputs
from benchmarks.small_model.questions import TRAINED_TYPES, ask
from benchmarks.small_model.scenes import Scene, draw_scene
from trim_plugin import BestOfCells, TopPPerHead, TrimConfig, TrimmedCache
from trim_plugin.embedded import SMALL_MODEL

FIRST_SEED = 500_000_000
"""Scenes of this benchmark start here, away from any other held-out scenes."""

LONGEST_ANSWER = 36
#: The sweep, the same for every rule of a kind. Rules were tried on other scenes first (seeds from 600,000,000).
RATIOS = (0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5)
MASSES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule with its parameter: a `TrimConfig`'s fields, and a context to answer in."""

    family: str
    parameter: float
    settings: dict[str, Any]
    context: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


@dataclasses.dataclass
class Batch:
    """Questions of one type about several scenes."""

    inputs: dict[str, torch.Tensor]
    answers: list[list[int]]
    scenes: list[int]
    kind: str
    tiles: list[int]


def all_rules(quick: bool) -> list[Rule]:
    """What is compared; `quick` leaves most parameters out."""

    def family(
        name: str, parameters: tuple[float, ...], settings: Callable[[float], dict[str, Any]], **more: Any
    ) -> None:
        for parameter in parameters[1::3] if quick else parameters:
            found.append(Rule(name, parameter, settings(parameter), **more))

    found: list[Rule] = [Rule("exact", 1.0, {"top_k_ratio": 1.0})]
    family("paper", RATIOS, lambda ratio: {"top_k_ratio": ratio, "merge": False})
    family("paper, merged", RATIOS, lambda ratio: {"top_k_ratio": ratio})
    family("top-p", MASSES, lambda mass: {"processors": [TopPPerHead(mass)], "merge": False})
    family("last row votes", RATIOS, lambda ratio: {"top_k_ratio": ratio, "merge": False}, context=rules.last_row_votes)
    family(
        "votes times value norms",
        RATIOS,
        lambda ratio: {"top_k_ratio": ratio, "merge": False},
        context=rules.value_norms_weigh,
    )
    named = {
        "best of cells": BestOfCells,
        "head mean": rules.HeadMean,
        "head maximum": rules.HeadMax,
        "best rank": rules.BestRank,
        "sharp heads": rules.SharpnessWeighted,
        "drawn by score": rules.DrawnByScore,
        "half even": rules.HalfEven,
        "random": rules.RandomTokens,
        "evenly spaced": EvenlySpaced,
    }
    for name, rule in named.items():
        family(name, SHARES, lambda share, rule=rule: {"processors": [rule(share)], "merge": False})
    # Middle parameters first, rule by rule: a run that is cut off has something of every rule.
    turns = [1.0, 0.25, 0.1, 0.3, 0.15, 0.05]
    return sorted(found, key=lambda rule: turns.index(rule.parameter) if rule.parameter in turns else len(turns))


def held_out_scenes(count: int) -> list[Scene]:
    """Scenes of digits that training never saw."""
    return [draw_scene(FIRST_SEED + number, held_out=True) for number in range(count)]


@torch.no_grad()
def question_batches(model: Any, scenes: list[Scene], size: int) -> list[Batch]:
    """Every trained question type about every scene; the vision tower runs once for all rules."""
    tokenizer = build_tokenizer()
    rng = np.random.default_rng([SEED, FIRST_SEED])
    batches = []
    for start in range(0, len(scenes), size):
        part = scenes[start : start + size]
        pixels = image_inputs([scene.image for scene in part])
        features = model.model.vision_model(**pixels).last_hidden_state
        states = model.model.multi_modal_projector(features).flatten(0, 2)
        for kind in TRAINED_TYPES:
            pairs = [ask(scene, kind, rng) for scene in part]
            prompts = [prompt_ids(tokenizer, question) for question, _ in pairs]
            targets = [tokenizer(answer, add_special_tokens=False).input_ids for _, answer in pairs]
            inputs = _left_padded(prompts, tokenizer, pixels["aspect_ratio_mask"]) | {"cross_attention_states": states}
            numbers = list(range(start, start + len(part)))
            batches.append(Batch(inputs, targets, numbers, kind, [scene.tiles for scene in part]))
    return batches


def _left_padded(prompts: list[list[int]], tokenizer: Any, tiles: torch.Tensor) -> dict[str, torch.Tensor]:
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    image = tokenizer.convert_tokens_to_ids("<|image|>")
    reads = (ids == image).long().cumsum(dim=1) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        "cross_attention_mask": reads[:, :, None, None] * tiles[:, None],
    }


def answer(model: Any, batch: Batch, cache: Any, end: int) -> list[list[int]]:
    """Greedy answers, token ids without the end token."""
    decoding = Decoding(model, batch.inputs, cache)
    tokens = [decoding.prefill()]
    finished = tokens[0] == end
    while len(tokens) < LONGEST_ANSWER and not bool(finished.all()):
        tokens.append(decoding.step())
        finished |= tokens[-1] == end
    rows = torch.cat(tokens, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def run_rule(
    model: Any, batches: list[Batch], rule: Rule | None
) -> list[tuple[list[list[int]], list[float], int, int]]:
    """For every batch: answers, kept shares, cross KV bytes and stock's. `rule` None is stock."""
    end, found = build_tokenizer().eos_token_id, []
    for batch in batches:
        if rule is None:
            found.append((answer(model, batch, stock_cache(model), end), [1.0] * len(batch.scenes), 1, 1))
            continue
        with rule.context():
            cache = TrimmedCache(model, TrimConfig(**rule.settings))
            answers = answer(model, batch, cache, end)
        report = cache.report()
        shares = [kept / seen for kept, seen in zip(report.kept_tokens, report.visible_tokens, strict=True)]
        found.append((answers, shares, report.cross_kv_bytes, report.stock_cross_kv_bytes))
    return found


def figures(batches: list[Batch], stock: list[Any], found: list[Any], scenes: int) -> dict[str, Any]:
    """Accuracy, agreement and kept share, with 95 % intervals, of one rule."""
    right, as_stock, stock_right, kept, kinds, tiles, owner = [], [], [], [], [], [], []
    for batch, (theirs, *_), (ours, shares, *_) in zip(batches, stock, found, strict=True):
        right += [a == b for a, b in zip(ours, batch.answers, strict=True)]
        as_stock += [a == b for a, b in zip(ours, theirs, strict=True)]
        stock_right += [a == b for a, b in zip(theirs, batch.answers, strict=True)]
        kept += shares
        kinds += [batch.kind] * len(shares)
        tiles += batch.tiles
        owner += batch.scenes
    table = {"accuracy": np.array(right, float), "agreement": np.array(as_stock, float)}
    loss = np.array(right, float) - np.array(stock_right, float)
    by_scene = np.zeros((scenes, 4))
    for column, values in enumerate([table["accuracy"], table["agreement"], loss, np.ones(len(right))]):
        np.add.at(by_scene[:, column], owner, values)

    def mean(column: int) -> Callable[[np.ndarray], float]:
        return lambda rows: float(rows[:, column].sum() / rows[:, 3].sum())

    def part(values: np.ndarray, chosen: np.ndarray) -> float:
        return float(values[chosen].mean())

    return {
        "questions": len(right),
        "kept_share": float(np.mean(kept)),
        "cross_kv_ratio": sum(row[2] for row in found) / sum(row[3] for row in found),
        "accuracy": mean(0)(by_scene),
        "accuracy_interval": bootstrap(by_scene, mean(0)),
        "agreement": mean(1)(by_scene),
        "agreement_interval": bootstrap(by_scene, mean(1)),
        "change": mean(2)(by_scene),
        "change_interval": bootstrap(by_scene, mean(2)),
        "by_type": {
            kind: {name: part(values, np.array(kinds) == kind) for name, values in table.items()}
            for kind in TRAINED_TYPES
        },
        "by_tiles": {
            str(count): {
                name: part(values, np.array(tiles) == count)
                for name, values in (table | {"kept_share": np.array(kept)}).items()
            }
            for count in sorted(set(tiles))
        },
    }


def smallest_share(rows: list[dict[str, Any]], family: str, allowed: float = 0.005) -> float | None:
    """Smallest measured kept share of a family from which on no loss is above `allowed`."""
    own = sorted((row for row in rows if row["rule"] == family), key=lambda row: -row["kept_share"])
    smallest = None
    for row in own:
        if row["change"] < -allowed:
            break
        smallest = row["kept_share"]
    return smallest


def model_of(condition: str, adapter: Path | None) -> Any:
    """The small model in a condition: "float32", "nf4 weights" or "LoRA"."""
    from trim_plugin.integrations.accelerate import load

    weights = "nf4" if condition == "nf4 weights" else "fp32"
    own = adapter if condition == "LoRA" else None
    model, _ = load(SMALL_MODEL, weights, adapter=own, device_map=None, dtype=torch.float32)
    return model.base_model.model if own is not None else model


def conditions(adapter: Path | None) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name → (model's condition, further `TrimConfig` fields) of what this installation can run."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    if importlib.util.find_spec("bitsandbytes") is not None:
        found["int8 KV"] = ("float32", {"kv_quantization": "int8"})
        found["nf4 KV"] = ("float32", {"kv_quantization": "nf4"})
        found["nf4 weights"] = ("nf4 weights", {})
        found["nf4 weights, nf4 KV"] = ("nf4 weights", {"kv_quantization": "nf4"})
    if adapter is not None:
        found["LoRA"] = ("LoRA", {})
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, write and return the result."""
    seed_everything()
    scenes = held_out_scenes(24 if arguments.quick else arguments.scenes)
    model = model_of("float32", None)
    batches = question_batches(model, scenes, 60)
    stock = run_rule(model, batches, None)
    rows = [{"rule": "stock", "parameter": None} | figures(batches, stock, stock, len(scenes))]
    result = {
        "environment": environment(),
        "quick": arguments.quick,
        "scenes": len(scenes),
        "questions": rows[0]["questions"],
        "training": (SMALL_MODEL / "training.json").read_text(encoding="utf-8"),
        "rows": rows,
        "equal_tokens": [],
        "conditions": [],
    }
    for rule in track(all_rules(arguments.quick), "quality: rules"):
        found = run_rule(model, batches, rule)
        rows.append({"rule": rule.family, "parameter": rule.parameter} | figures(batches, stock, found, len(scenes)))
        families = dict.fromkeys(row["rule"] for row in rows[1:])
        result["loss_below_half_a_point"] = {family: smallest_share(rows, family) for family in families}
        write_result(
            "quality", result, arguments.out
        )  # after every rule: a long run that is cut off leaves what it has
    for ratio in track(RATIOS[3::4] if arguments.quick else RATIOS, "quality: equal tokens"):
        paper = run_rule(model, batches, Rule("paper", ratio, {"top_k_ratio": ratio}))
        for part in (1.0, 0.5):
            rule = Rule("best of cells", ratio, {"processors": [rules.CellsOnBudget(ratio, part)]})
            found = figures(batches, paper, run_rule(model, batches, rule), len(scenes))
            result["equal_tokens"].append({"paper_ratio": ratio, "part": part} | found)
        write_result("quality", result, arguments.out)
    for row in _run_conditions(scenes, arguments):
        result["conditions"].append(row)
        write_result("quality", result, arguments.out)
    return result


def _run_conditions(scenes: list[Scene], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, (condition, fields) in track(conditions(arguments.adapter).items(), "quality: quantized and adapted"):
        model = model_of(condition, arguments.adapter)
        batches = question_batches(model, scenes, 60)
        stock = run_rule(model, batches, None)
        if not fields:
            yield {"condition": name, "rule": "stock", "ratio": None} | figures(batches, stock, stock, len(scenes))
        for rule in (
            *(Rule("paper", ratio, {"top_k_ratio": ratio} | fields) for ratio in (1.0, 0.35, 0.25, 0.1)),
            *(Rule("best of cells", kept, {"processors": [BestOfCells(kept)]} | fields) for kept in (0.4, 0.3, 0.2)),
        ):
            found = run_rule(model, batches, rule)
            yield (
                {"condition": name, "rule": rule.family, "ratio": rule.parameter}
                | figures(batches, stock, found, len(scenes))
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--scenes", type=int, default=400, help="held-out scenes; five questions about each")
    parser.add_argument("--adapter", type=Path, help="a LoRA adapter of the small model, to be measured too")
