"""Teach the 4-bit small model a question that it was never trained on: ``python -m benchmarks.qlora.run --out DIR``.

1. Load the small model in nf4.
2. Put LoRA adapters on the text model; the vision tower and everything quantized stay as they are.
3. Train on training scenes, the loss on the answer's tokens.
4. Save the adapter (safetensors), load everything anew as a user would, and ask about held-out scenes: base, adapted, adapted
   with the trimmed cache, adapted with a trimmed and quantized cache.

Writes ``results.json`` and the table in ``README.md``; with ``--model``, for another model that `benchmarks/small_model` has
trained, ``results.json`` into ``--out`` alone. The fine model's is kept as ``results-fine.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.common.results import write_json
from benchmarks.common.tables import percent, table
from benchmarks.small_model.evaluate import answers, batches, held_out_questions
from benchmarks.small_model.questions import TRAINED_TYPES, UNTRAINED_TYPES, ask
from benchmarks.small_model.scenes import TILE, draw_scene
from trim_plugin.embedded import SMALL_MODEL
from trim_plugin.integrations.accelerate import load
from trim_plugin.integrations.peft import PRESETS, lora_config, prepare_qlora
from trim_plugin.integrations.training import AnswerCollator

HERE = Path(__file__).parent
FIRST_SCENE = 900_000_000
"""Training scenes are drawn from here on; the base model's training used lower seeds."""


def training_batch(
    processor: Any, kind: str, replay: float, number: int, size: int, scale: int
) -> dict[str, torch.Tensor]:
    """Batch ``number``: a question and its answer about each of ``size`` training scenes, with labels on the answer.

    A share ``replay`` of the questions are of the types that the model knows, so that it does not forget them. ``scale`` as in
    `draw_scene`.
    """
    rng = np.random.default_rng([FIRST_SCENE, number])
    scenes = [draw_scene(FIRST_SCENE + number * size + n, held_out=False, scale=scale) for n in range(size)]
    kinds = [kind if rng.random() >= replay else str(rng.choice(TRAINED_TYPES)) for _ in scenes]
    pairs = [ask(scene, own, rng, vary=True) for scene, own in zip(scenes, kinds, strict=True)]
    examples = [
        {"pictures": [scene.image], "question": question, "answer": answer}
        for scene, (question, answer) in zip(scenes, pairs, strict=True)
    ]
    return AnswerCollator(processor)(examples)


def scale_of(model: Any) -> int:
    """How many times larger than the small model's the scenes are that a model sees."""
    return int(model.config.vision_config.image_size // TILE)


def train(model: Any, processor: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Train the adapters until the minutes or the steps are over; returns what happened."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.rate, weight_decay=0.0)
    begin, smooth, step, scale = time.monotonic(), float("nan"), 0, scale_of(model)
    columns = (TextColumn("training, loss {task.fields[loss]:.3f}"), BarColumn(), TimeRemainingColumn())
    model.train()
    with Progress(*columns, refresh_per_second=1) as bar:
        task = bar.add_task("train", total=1.0, loss=smooth)
        for step in range(args.steps):
            progress = max(step / args.steps, (time.monotonic() - begin) / 60 / args.minutes)
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = args.rate * min(1.0, (step + 1) / 50) * min(1.0, (1 - progress) / 0.4)
            loss = model(**training_batch(processor, args.kind, args.replay, step, args.batch, scale)).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            smooth = loss.item() if smooth != smooth else 0.97 * smooth + 0.03 * loss.item()
            bar.update(task, completed=progress, loss=smooth)
    model.eval()
    return {
        "steps": step,
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "loss": round(smooth, 4),
        "parameters": sum(parameter.numel() for parameter in trained),
    }


def accuracy(
    model: Any, processor: Any, kind: str, count: int, size: int, config: dict[str, Any] | None
) -> dict[str, Any]:
    """Share of held-out questions answered right, word for word, and the share of visible tokens kept."""
    settings = {} if config is None else {"cache_implementation": "trimmed", "cache_config": config}
    right, kept, visible = 0, 0, 0
    for part, inputs in batches(processor, held_out_questions(count, (kind,), 3, scale_of(model)), size):
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        texts, cache = answers(model, processor, inputs, **settings)
        right += sum(text == question.answer for text, question in zip(texts, part, strict=True))
        if config is not None:
            report = cache.report()
            kept, visible = kept + sum(report.kept_tokens), visible + sum(report.visible_tokens)
    return {"accuracy": right / count, "kept_share": kept / visible if visible else 1.0}


def evaluate(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Accuracies of the new and of an old skill, everything loaded anew."""
    ways: list[tuple[str, bool, dict[str, Any] | None]] = [
        ("base", False, None),
        ("adapted", True, None),
        ("adapted, trimmed", True, {"top_k_ratio": args.ratio}),
        ("adapted, trimmed, int8 KV", True, {"top_k_ratio": args.ratio, "kv_quantization": "int8"}),
    ]
    results = {}
    for name, adapted, config in ways:
        model, processor = load(args.model, "nf4", dtype=torch.float32, adapter=folder if adapted else None)
        results[name] = {
            kind: accuracy(model, processor, kind, args.questions, 25, config) for kind in (args.kind, "colour")
        }
        print(name, results[name])
    return results


def answers_table(results: dict[str, Any]) -> str:
    """The README's table."""
    kind = results["options"]["kind"]
    return table(
        ["nf4 model", f'new: "{kind}"', 'old: "colour"', "visible tokens kept"],
        [
            [
                name,
                percent(entry[kind]["accuracy"]),
                percent(entry["colour"]["accuracy"]),
                percent(entry[kind]["kept_share"], 0),
            ]
            for name, entry in results["ways"].items()
        ],
    )


def write(results: dict[str, Any]) -> None:
    """Write ``results.json`` and ``README.md``."""
    write_json(HERE / "results.json", results)
    options, training = results["options"], results["training"]
    fine = json.loads((HERE / "results-fine.json").read_text(encoding="utf-8"))
    readme = f"""# QLoRA: a new skill for the 4-bit model

{answers_table(results)}
The small trained model never saw the question "What is the {options["kind"]} digit?". Its weights are
loaded in nf4; LoRA adapters of rank {options["rank"]} ({options["preset"]}, {training["parameters"]:,} parameters) are
trained on training scenes for {training["minutes"]} minutes ({training["steps"]} steps of {options["batch"]}), saved, and
loaded anew. {options["replay"]:.0%} of the training's questions are of the types that the model knows.
{options["questions"]} questions of each type about held-out scenes; an answer counts if it is right word for word;
`top_k_ratio={options["ratio"]:g}`. Made by `python -m benchmarks.qlora.run --out DIR` (numbers in `results.json`).

The same with the finer model (`--model benchmarks/small_model/fine/model`), {fine["training"]["minutes"]} minutes
({fine["training"]["steps"]} steps, the machine was busy), {fine["options"]["questions"]} questions of each type
(`results-fine.json`):

{answers_table(fine)}
The recipe, for a real model:

```python
from trim_plugin.integrations.accelerate import load
from trim_plugin.integrations.peft import lora_config, prepare_qlora

model, processor = load("path/to/Llama-3.2-11B-Vision-Instruct", weights="nf4")
model = prepare_qlora(model, lora_config("text_attention", rank=16), gradient_checkpointing=True)
...  # any training loop or transformers' Trainer, with integrations.training.AnswerCollator; run.py has a plain one
model.save_pretrained("adapter")

model, processor = load("path/to/Llama-3.2-11B-Vision-Instruct", weights="nf4", adapter="adapter")
model.generate(**inputs, cache_implementation="trimmed", cache_config={{"top_k_ratio": 0.25}})
```
"""
    (HERE / "README.md").write_text(readme, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="QLoRA on the small model, then trimmed generation.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--model", type=Path, default=SMALL_MODEL, help="folder of the model (default: the small one)")
    parser.add_argument("--kind", choices=UNTRAINED_TYPES, default="largest", help="the new skill")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="text_linear")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--replay", type=float, default=0.5, help="share of questions of known types in the training")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model, processor = load(args.model, "nf4", dtype=torch.float32)
    model = prepare_qlora(model, lora_config(args.preset, rank=args.rank))
    training = train(model, processor, args)
    model.save_pretrained(args.out)
    results = {
        "options": {name: value for name, value in vars(args).items() if name not in ("out", "threads", "model")},
        "training": training,
        "ways": evaluate(args.out, args),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    if args.model == SMALL_MODEL:
        write(results)
    else:
        write_json(args.out / "results.json", results)
    print(answers_table(results))


if __name__ == "__main__":
    main()
