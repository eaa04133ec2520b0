"""Accuracy on held-out scenes, stock and trimmed: ``python -m benchmarks.small_model.evaluate``.

Every question is asked about a scene of its own, of digits or in a size of print that training never showed, in the first
wording of its type. An answer counts only if it is right word for word. Writes ``results/evaluation.json`` and renders the
tables of ``README.md`` from it. For another model: ``--model fine --into benchmarks/small_model/fine``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from rich.progress import Progress

from benchmarks.common.results import write_json
from benchmarks.common.tables import percent, table
from benchmarks.small_model.scenes import TILE
from benchmarks.small_model.tasks import DIGITS, TASKS, Task, folder_of, task_of

HERE = Path(__file__).parent
RATIOS = (1.0, 0.5, 0.25, 0.15, 0.1, 0.05, 0.02)
NEW_TOKENS = 44


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a held-out scene."""

    image: Image.Image
    tiles: int
    kind: str
    text: str
    answer: str


def held_out_questions(
    count: int, kinds: tuple[str, ...] = (), seed: int = 0, scale: int = 1, task: Task = DIGITS
) -> list[Question]:
    """``count`` questions, the types in turn, each about a scene of its own; ``scale`` as in ``draw_scene``."""
    questions, kinds = [], kinds or task.types
    for number in range(count):
        kind = kinds[number % len(kinds)]
        scene = task.draw(seed * 1_000_000 + number, scale * TILE, True)
        text, answer = task.ask(scene, kind, np.random.default_rng([seed, number]))
        questions.append(Question(scene.image, scene.tiles, kind, text, answer))
    return questions


def batches(
    processor: Any, questions: list[Question], size: int
) -> Iterator[tuple[list[Question], dict[str, torch.Tensor]]]:
    """Left-padded batches of questions of one type, so that answers are of like length."""
    ordered = sorted(questions, key=lambda question: question.kind)
    processor.tokenizer.padding_side = "left"
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}],
                add_generation_prompt=True,
            )
            for question in part
        ]
        inputs = processor(
            images=[[question.image] for question in part],
            text=prompts,
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )
        yield part, dict(inputs)


def answers(model: Any, processor: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> tuple[list[str], Any]:
    """Greedy answers of a batch, and the cache."""
    output = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **settings
    )
    texts = processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts], output.cache


def evaluate(
    model: Any, processor: Any, questions: list[Question], ratios: tuple[float, ...], size: int
) -> dict[str, Any]:
    """Answers and accuracy of stock and of every ratio."""
    ways: list[tuple[str, dict[str, Any]]] = [("stock", {})]
    ways += [
        (
            "exact" if ratio == 1 else f"{ratio:g}",
            {"cache_implementation": "trimmed", "cache_config": {"top_k_ratio": ratio}},
        )
        for ratio in ratios
    ]
    found: dict[str, list[tuple[Question, str, float]]] = {name: [] for name, _ in ways}
    with Progress() as progress:
        task = progress.add_task("evaluating", total=len(questions) * len(ways))
        for part, inputs in batches(processor, questions, size):
            for name, settings in ways:
                texts, cache = answers(model, processor, inputs, **settings)
                shares = [1.0] * len(part)
                if settings:
                    report = cache.report()
                    shares = [kept / seen for kept, seen in zip(report.kept_tokens, report.visible_tokens, strict=True)]
                found[name] += list(zip(part, texts, shares, strict=True))
                progress.update(task, advance=len(part))
    stock = [text for _, text, _ in found["stock"]]
    return {name: _summary(entries, stock) for name, entries in found.items()}


def _summary(entries: list[tuple[Question, str, float]], stock: list[str]) -> dict[str, Any]:
    right = [text == question.answer for question, text, _ in entries]
    asked = {question.kind for question, _, _ in entries}
    kinds = [kind for task in TASKS.values() for kind in task.types if kind in asked]
    first = kinds[0]
    tiles = sorted({question.tiles for question, _, _ in entries})

    def mean(chosen: list[bool]) -> float | None:  # None: nothing was asked
        count = sum(chosen)
        return sum(flag for flag, use in zip(right, chosen, strict=True) if use) / count if count else None

    return {
        "questions": len(entries),
        "accuracy": sum(right) / len(right),
        "by_type": {kind: mean([question.kind == kind for question, _, _ in entries]) for kind in kinds},
        "by_tiles": {str(count): mean([question.tiles == count for question, _, _ in entries]) for count in tiles},
        f"{first}_by_tiles": {
            str(count): mean([question.tiles == count and question.kind == first for question, _, _ in entries])
            for count in tiles
        },
        "same_as_stock": sum(text == other for (_, text, _), other in zip(entries, stock, strict=True)) / len(entries),
        "kept_share": sum(share for _, _, share in entries) / len(entries),
    }


def training_lines(record: dict[str, Any]) -> list[str]:
    """How the checkpoint was trained, as Markdown."""
    lines = [f"Training record of this checkpoint: seed {record['seed']}.", ""]
    lines += ["| stage | steps | minutes | answer tokens right | digit patches named right |", "| --- " * 5 + "|"]
    for name, stage in record["stages"].items():
        words = f"{stage['words']:.3f}" if "words" in stage else ""
        patches = f"{stage['patches']:.3f}" if "patches" in stage else ""
        lines.append(f"| {name} | {stage['steps']} | {stage['minutes']} | {words} | {patches} |")
    return [*lines, "", "The last two columns are running means on training scenes, with augmentation.", ""]


def _cell(accuracy: float | None) -> str:
    return "–" if accuracy is None else f"{accuracy:.3f}"


def tables(results: dict[str, Any]) -> str:
    """The README's tables."""
    ways = results["ways"]
    kinds, tiles = list(ways["stock"]["by_type"]), list(ways["stock"]["by_tiles"])
    lines = training_lines(results["training"]) if results["training"] else []
    lines += [
        f"{results['questions']} questions about held-out scenes ({results['questions'] // len(kinds)} of each type), "
        f"scene seed {results['seed']}.",
        "",
        "Stock, by number of tiles:",
        "",
        table(
            ["", *(f"{count} tile{'s' if count != '1' else ''}" for count in tiles), "all"],
            [
                [title, *(_cell(ways["stock"][key][count]) for count in tiles), _cell(total)]
                for title, key, total in (
                    ("all types", "by_tiles", ways["stock"]["accuracy"]),
                    (f"{kinds[0]} question", f"{kinds[0]}_by_tiles", ways["stock"]["by_type"][kinds[0]]),
                )
            ],
        ),
        "By type of question"
        + (", trimmed by `top_k_ratio`" if len(ways) > 1 else "")
        + " (kept: mean share of the visible tokens that are read):",
        "",
        table(
            ["cache", "kept", "all", *kinds, "same answer as stock"],
            [
                [
                    name,
                    f"{way['kept_share']:.2f}",
                    f"{way['accuracy']:.3f}",
                    *(_cell(way["by_type"][kind]) for kind in kinds),
                    percent(way["same_as_stock"]),
                ]
                for name, way in ways.items()
            ],
        ),
    ]
    return "\n".join(lines).rstrip()


def render(readme: Path, results: dict[str, Any]) -> None:
    """Put the tables between the README's markers."""
    begin, end = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    readme.write_text(f"{before}{begin}\n{tables(results)}\n{end}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    import trim_plugin
    from trim_plugin.embedded import SMALL_MODEL

    parser = argparse.ArgumentParser(description="Evaluate a small Mllama on held-out scenes.")
    parser.add_argument(
        "--model", default=str(SMALL_MODEL), help='"fine", "pages" or a checkpoint folder (default: the shipped one)'
    )
    parser.add_argument("--into", type=Path, default=HERE, help="folder of the README.md and results to write")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--ratios", type=float, nargs="*", default=list(RATIOS))
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="print the tables, write nothing")
    args = parser.parse_args(arguments)
    folder = folder_of(args.model)
    model = transformers.MllamaForConditionalGeneration.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    record = folder / "training.json"
    begin = time.monotonic()
    scale = model.config.vision_config.image_size // TILE
    questions = held_out_questions(args.questions, seed=args.seed, scale=scale, task=task_of(folder))
    ways = evaluate(model, processor, questions, tuple(args.ratios), args.batch)
    results = {
        "questions": args.questions,
        "seed": args.seed,
        "training": json.loads(record.read_text(encoding="utf-8")) if record.exists() else None,
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "versions": {
            "trim_plugin": trim_plugin.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "ways": ways,
    }
    if not args.dry:
        write_json(args.into / "results" / "evaluation.json", results)
    print(tables(results))
    if not args.dry:
        render(args.into / "README.md", results)


if __name__ == "__main__":
    main()
