"""Teach a 4-bit trained model a question that it was never trained on: ``python -m benchmarks.qlora.run --out DIR``.

1. Load the model in nf4, with ``--tower-whole`` without its vision tower.
2. Put LoRA adapters on the text model; the vision tower and everything quantized stay as they are.
3. Train on training scenes, the loss on the answer's tokens.
4. Save the adapter (safetensors), load everything anew as a user would, and ask about held-out scenes: base, adapted, adapted
   with the trimmed cache by the default rule, the same with a quantized cache, adapted with the paper's rule.

Writes ``results.json``, for other models (``--model fine``, ``--model pages``) ``results-fine.json`` and so on, and the tables in
``README.md``. The rate follows the steps, so the same seed gives the same adapter if ``--minutes`` is enough for all of them.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.common.results import read_result, write_result
from benchmarks.common.tables import percent, table
from benchmarks.small_model.evaluate import answers, batches, held_out_questions
from benchmarks.small_model.scenes import TILE
from benchmarks.small_model.tasks import FOLDERS, TASKS, Task, folder_of, result_name, task_of
from trim_plugin.config import DEFAULT_KEPT_SHARE
from trim_plugin.embedded import SMALL_MODEL
from trim_plugin.integrations.accelerate import load
from trim_plugin.integrations.peft import PRESETS, lora_config, prepare_qlora
from trim_plugin.integrations.training import AnswerCollator

HERE = Path(__file__).parent
FIRST_SCENE = 900_000_000
"""Training scenes are drawn from here on; the base model's training used lower seeds."""

PICTURE_TENSORS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")

MODELS = {
    SMALL_MODEL: "The small model",
    FOLDERS["fine"]: "The finer model",
    FOLDERS["pages"]: "The model that reads pages",
}
"""Folders of the models whose results are kept, and the README's titles."""


def training_batch(
    processor: Any, task: Task, number: int, args: argparse.Namespace
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Batch ``number``: ``args.about`` questions about each of its training scenes, with labels on the answers.

    A share ``args.replay`` of the questions are of the types that the model knows, so that it does not forget them.

    Returns:
        What the text model takes of all questions, and the pictures' tensors, each picture once.
    """
    rng, tile = np.random.default_rng([FIRST_SCENE, number]), processor.image_processor.size["height"]
    count = args.batch // args.about
    examples = []
    for seed in range(FIRST_SCENE + number * count, FIRST_SCENE + (number + 1) * count):
        scene = task.draw(seed, tile, False)
        for _ in range(args.about):
            kind = args.kind if rng.random() >= args.replay else str(rng.choice(task.types))
            question, answer = task.ask(scene, kind, rng, vary=True)
            examples.append({"pictures": [scene.image], "question": question, "answer": answer})
    batch = AnswerCollator(processor)(examples)
    pictures = {name: batch.pop(name)[:: args.about] for name in PICTURE_TENSORS}
    return batch, pictures


def loss_of(model: Any, batch: dict[str, torch.Tensor], pictures: dict[str, torch.Tensor], about: int) -> torch.Tensor:
    """The loss on the answers; the tower, which stays as it is, reads every picture once for all questions about it."""
    base = model.get_base_model().model
    with torch.no_grad():
        states = base.multi_modal_projector(base.vision_model(**pictures).last_hidden_state.flatten(1, 2))
    return model(**batch, cross_attention_states=states.repeat_interleave(about, dim=0).flatten(0, 1)).loss


def train(model: Any, processor: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Train the adapters until the minutes or the steps are over; returns what happened."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.rate, weight_decay=0.0)
    begin, smooth, step, asked = time.monotonic(), float("nan"), 0, task_of(args.model)
    columns = (TextColumn("training, loss {task.fields[loss]:.3f}"), BarColumn(), TimeRemainingColumn())
    model.train()
    with Progress(*columns, refresh_per_second=1) as bar:
        task = bar.add_task("train", total=1.0, loss=smooth)
        while step < args.steps:
            progress = max(step / args.steps, (time.monotonic() - begin) / 60 / args.minutes)
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = args.rate * min(1.0, (step + 1) / 50) * min(1.0, (1 - progress) / 0.4)
            loss = loss_of(model, *training_batch(processor, asked, step, args), args.about)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            step += 1
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
    model: Any, processor: Any, task: Task, kind: str, count: int, size: int, config: dict[str, Any] | None
) -> dict[str, Any]:
    """Share of held-out questions answered right, word for word, and the share of visible tokens kept."""
    settings = {} if config is None else {"cache_implementation": "trimmed", "cache_config": config}
    right, kept, visible = 0, 0, 0
    scale = model.config.vision_config.image_size // TILE
    for part, inputs in batches(processor, held_out_questions(count, (kind,), 3, scale, task), size):
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
        ("adapted, trimmed", True, {}),
        ("adapted, trimmed, int8 KV", True, {"kv_quantization": "int8"}),
        (f"adapted, top_k_ratio={args.ratio:g}", True, {"top_k_ratio": args.ratio}),
    ]
    results, task = {}, task_of(args.model)
    for name, adapted, config in ways:
        model, processor = load_nf4(args, folder if adapted else None)
        results[name] = {
            kind: accuracy(model, processor, task, kind, args.questions, 25, config)
            for kind in (args.kind, task.types[0])
        }
        print(name, results[name], flush=True)
    return results


def load_nf4(args: argparse.Namespace, adapter: Path | None = None) -> tuple[Any, Any]:
    """The model in 4 bits, perhaps with an adapter, and its processor."""
    return load(args.model, "nf4", dtype=torch.float32, adapter=adapter, quantize_vision=not args.tower_whole)


def answers_table(results: dict[str, Any]) -> str:
    """What a run's model answers, a line a way."""
    new, old = next(iter(results["ways"].values()))
    return table(
        ["nf4 model", f'new: "{new}"', f'old: "{old}"', "visible tokens kept"],
        [
            [
                name,
                percent(entry[new]["accuracy"]),
                percent(entry[old]["accuracy"]),
                percent(entry[new]["kept_share"], 0),
            ]
            for name, entry in results["ways"].items()
        ],
    )


def said_of(results: dict[str, Any]) -> str:
    """How a run's adapter was trained, in a sentence."""
    options, training = results["options"], results["training"]
    return (
        f"{training['parameters']:,} parameters, {training['steps']:,} steps of {options['batch']} questions in "
        f"{training['minutes']} minutes on {options['threads']} core{'s' if options['threads'] > 1 else ''}; "
        f"{options['questions']} questions of each type."
    )


def write_readme(folder: Path) -> None:
    """Write ``README.md`` from the results of `MODELS` in a folder, if there are any."""
    read = {title: read_result(result_name("results", model), folder) for model, title in MODELS.items()}
    found = {title: results for title, results in read.items() if results is not None}
    if not found:
        return
    options = next(iter(found.values()))["options"]
    parts = [f"## {title}\n\n{answers_table(results)}\n{said_of(results)}\n" for title, results in found.items()]
    readme = f"""# QLoRA: a new skill for a 4-bit model

The trained models never saw "What is the largest digit?" and "What is the last number?" (the lowest on the page). Their
weights are loaded in nf4; LoRA adapters of rank {options["rank"]} ({options["preset"]}) learn it on training scenes,
are saved, and loaded anew. Of the training's questions {percent(options["replay"], 0)} are of types that the model
knows. Questions are about held-out scenes; an answer counts if it is right word for word. *Trimmed* is the default,
`KCenter({DEFAULT_KEPT_SHARE})`. The vision tower of the model that reads pages stays in float32, because
[nf4 breaks it](../small_model/pages/README.md#in-4-bits).

Made by `python -m benchmarks.qlora.run --out DIR`, with `--model fine`, and with `--model pages --tower-whole` (numbers in
`results*.json`).

{chr(10).join(parts)}
## The recipe, for a real model

```python
from trim_plugin.integrations.accelerate import load
from trim_plugin.integrations.peft import lora_config, prepare_qlora

model, processor = load("path/to/Llama-3.2-11B-Vision-Instruct", weights="nf4")
model = prepare_qlora(model, lora_config("text_attention", rank=16), gradient_checkpointing=True)
...  # any training loop or transformers' Trainer, with integrations.training.AnswerCollator; run.py has a plain one
model.save_pretrained("adapter")

model, processor = load("path/to/Llama-3.2-11B-Vision-Instruct", weights="nf4", adapter="adapter")
model.generate(**inputs, cache_implementation="trimmed")
```
"""
    (folder / "README.md").write_text(readme, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="QLoRA on a trained model, then trimmed generation.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of the README.md and results to write")
    parser.add_argument("--model", default=SMALL_MODEL, help='"fine", "pages" or a folder (default: the small model)')
    untrained = [kind for task in TASKS.values() for kind in task.untrained]
    parser.add_argument("--kind", choices=untrained, help="the new skill (default: the first that the model lacks)")
    parser.add_argument("--tower-whole", action="store_true", help="leave the vision tower in float32")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="text_linear")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--replay", type=float, default=0.5, help="share of questions of known types in the training")
    parser.add_argument("--minutes", type=float, default=60.0, help="end before all steps are done")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--about", type=int, default=3, help="questions about a scene; they share one reading of it")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--ratio", type=float, default=0.15)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(arguments)
    args.model = folder_of(args.model)
    args.kind = args.kind or task_of(args.model).untrained[0]
    if args.kind not in task_of(args.model).untrained:
        parser.error(
            f"--kind {args.kind}: this model's scenes are asked for {', '.join(task_of(args.model).untrained)}"
        )
    if args.batch % args.about:
        parser.error(f"--batch {args.batch} is not a multiple of --about {args.about}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model, processor = load_nf4(args)
    model = prepare_qlora(model, lora_config(args.preset, rank=args.rank))
    training = train(model, processor, args)
    model.save_pretrained(args.out)
    results = {
        "options": {name: value for name, value in vars(args).items() if name not in ("out", "results", "model")},
        "training": training,
        "ways": evaluate(args.out, args),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    write_result(result_name("results", args.model), results, args.results)
    write_readme(args.results)
    print(answers_table(results))


if __name__ == "__main__":
    main()
