"""Measure quantized cross-attention keys and values: ``python -m benchmarks.kv_quantization.measure``.

Three figures, each against the trimmed cache that quantizes nothing, with the same visual tokens:

* logits: relative error of the logits of all answer tokens that are decoded from the cache, the answer given (float32);
* answers: share of held-out questions with the same answer, word for word, and how many are right;
* bytes: keys and values held for a picture of one tile, in bfloat16 and quantized, scales counted.

Writes ``results.json`` and the table in ``README.md``.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import Progress

from benchmarks.common.results import write_json
from benchmarks.common.tables import percent, table
from benchmarks.small_model.evaluate import NEW_TOKENS, batches, held_out_questions
from trim_plugin import TrimmedCache
from trim_plugin.embedded import SMALL_MODEL, load_small_model
from trim_plugin.kv_formats import KV_FORMATS

HERE = Path(__file__).parent
FORMATS = (None, *KV_FORMATS)


def decoded_logits(
    model: Any, inputs: dict[str, torch.Tensor], answer: torch.Tensor, config: dict[str, Any]
) -> torch.Tensor:
    """Logits (batch, answer tokens, vocabulary) after each token of a given answer, read from a trimmed cache."""
    cache = TrimmedCache(model, config)
    with torch.no_grad():
        model(**inputs, cache=cache, use_cache=True)
        seen = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1)
        mask = inputs["cross_attention_mask"][:, -1:].expand(-1, answer.shape[1], -1, -1)
        positions = (seen.cumsum(1) - 1)[:, -answer.shape[1] :]
        return model(
            input_ids=answer,
            attention_mask=seen,
            cross_attention_mask=mask,
            position_ids=positions,
            cache=cache,
            use_cache=True,
        ).logits


def measure(model: Any, processor: Any, ratio: float, count: int, size: int, seed: int) -> dict[str, Any]:
    """Errors and answers of every format."""
    pad = processor.tokenizer.pad_token_id
    texts: dict[str | None, list[str]] = {name: [] for name in FORMATS}
    truths: list[str] = []
    errors = {name: 0.0 for name in FORMATS if name}
    worst = dict(errors)
    norm = 0.0
    with Progress() as progress:
        task = progress.add_task("measuring", total=count)
        for part, inputs in batches(processor, held_out_questions(count, seed=seed), size):
            answer = torch.empty(0)
            reference = torch.empty(0)
            for name in FORMATS:
                config = {"top_k_ratio": ratio, "kv_quantization": name}
                output = model.generate(
                    **inputs,
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    cache_implementation="trimmed",
                    cache_config=config,
                )[:, inputs["input_ids"].shape[1] :]
                texts[name] += [text.strip() for text in processor.batch_decode(output, skip_special_tokens=True)]
                if name is None:
                    answer = output
                logits = decoded_logits(model, inputs, answer, config)[answer != pad]
                if name is None:
                    reference = logits
                    norm += float(logits.norm()) ** 2
                else:
                    errors[name] += float((logits - reference).norm()) ** 2
                    rows = (logits - reference).norm(dim=-1) / reference.norm(dim=-1)
                    worst[name] = max(worst[name], float(rows.max()))
            truths += [question.answer for question in part]
            progress.advance(task, len(part))
    return {
        name or "none": {
            "accuracy": sum(map(str.__eq__, texts[name], truths)) / count,
            "same_answers": sum(map(str.__eq__, texts[name], texts[None])) / count,
            "logits_relative_error": (errors[name] / norm) ** 0.5 if name else 0.0,
            "worst_token": worst[name] if name else 0.0,
        }
        for name in FORMATS
    }


def held_bytes(ratio: float) -> dict[str, int]:
    """Bytes of the cross-attention keys and values for a picture of one tile, in a bfloat16 model."""
    model, processor = load_small_model(torch.bfloat16)
    question = next(question for question in held_out_questions(100) if question.tiles == 1)
    _, inputs = next(batches(processor, [question], 1))
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    held = {}
    for name in FORMATS:
        cache = TrimmedCache(model, {"top_k_ratio": ratio, "kv_quantization": name})
        with torch.no_grad():
            model(**inputs, cache=cache, use_cache=True)
        held[name or "bf16"] = cache.report().cross_kv_bytes
        held["stock"] = cache.report().stock_cross_kv_bytes
    return held


def formats_table(results: dict[str, Any]) -> str:
    """The README's table."""
    lines = []
    for name, entry in results["formats"].items():
        held = results["bytes"]["bf16" if name == "none" else name]
        lines.append(
            [
                "not quantized" if name == "none" else name,
                percent(entry["logits_relative_error"], 2),
                percent(entry["worst_token"], 2),
                percent(entry["same_answers"]),
                percent(entry["accuracy"]),
                f"{held:,}",
                f"{held / results['bytes']['bf16']:.3f}",
            ]
        )
    header = ["kept KV", "logits' relative error", "worst token", "same answers", "right answers", "bytes, 1 tile"]
    return table([*header, "of bf16"], lines)


def write(results: dict[str, Any]) -> None:
    """Write ``results.json`` and ``README.md``."""
    write_json(HERE / "results.json", results)
    readme = f"""# Quantized cross-attention keys and values

{formats_table(results)}
Small trained model, {results["questions"]} questions about held-out scenes, `top_k_ratio={results["ratio"]:g}`; logits and
answers in float32, bytes in bfloat16 (stock holds {results["bytes"]["stock"]:,} there). Errors are of the logits of answer tokens
decoded from the cache, the answer given; the answer's first token comes from the prefill, which nothing touches.
Made by `python -m benchmarks.kv_quantization.measure` (numbers in `results.json`).
"""
    (HERE / "README.md").write_text(readme, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure quantized cross-attention keys and values.")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = load_small_model()
    results = {
        "model": SMALL_MODEL.name,
        "questions": args.questions,
        "ratio": args.ratio,
        "seed": args.seed,
        "formats": measure(model, processor, args.ratio, args.questions, args.batch, args.seed),
        "bytes": held_bytes(args.ratio),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    write(results)
    print(formats_table(results))


if __name__ == "__main__":
    main()
