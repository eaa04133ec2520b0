"""Train the small Mllama from a seed: ``python -m benchmarks.small_model.train --out DIR``.

Stage 1 trains the vision tower with a linear head that names the digit under every patch; stage 2 trains the whole
model on questions, with the loss on answer tokens (and, lightly, still on the patches). Written every two minutes: the
moving average of the weights, as a complete checkpoint that ``from_pretrained`` loads.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader
from transformers import MllamaForConditionalGeneration

from benchmarks.common.results import write_json
from benchmarks.small_model.architecture import build_config, build_model, build_processor
from benchmarks.small_model.batches import SceneBatches

SAVE_EVERY_S = 120


def cross_attention_inputs(
    model: MllamaForConditionalGeneration, batch: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the vision tower: its features (B, 4, 65, 288) and the projected states (B, 260, 128)."""
    inputs = {key: batch[key] for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    features = model.model.vision_model(**inputs).last_hidden_state[:, 0]
    states = model.model.multi_modal_projector(features)
    return features, states.flatten(1, 2)


def packed_logits(
    model: MllamaForConditionalGeneration, states: torch.Tensor, texts: dict[str, torch.Tensor], tiles: torch.Tensor
) -> torch.Tensor:
    """Logits (B, T, vocabulary) of packed rows; segments don't see each other. ``tiles`` is the mask (B, 1, 4)."""
    segments, visible = texts["segments"], texts["visible"]
    lowest = torch.finfo(states.dtype).min
    length = segments.shape[1]
    allowed = (segments[:, :, None] == segments[:, None]) & torch.ones(length, length, dtype=torch.bool).tril()
    causal = torch.zeros(allowed.shape).masked_fill_(~allowed, lowest)[:, None]
    patches = states.shape[1] // tiles.shape[-1]
    # A blind row's mask is zero everywhere and its output is masked out, as the model does it.
    hidden = (1.0 - tiles[:, 0].repeat_interleave(patches, dim=1).to(states.dtype)) * lowest
    cross = hidden[:, None, None, :] * visible[:, None, :, None]
    output = model.model.language_model(
        input_ids=texts["input_ids"],
        position_ids=texts["position_ids"],
        attention_mask=causal,
        cross_attention_states=states,
        cross_attention_mask=cross,
        full_text_row_masked_out_mask=visible[:, None, :, None].to(states.dtype),
        use_cache=False,
    )
    return model.lm_head(output.last_hidden_state)


def patch_loss(head: nn.Module, features: torch.Tensor, batch: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Loss of naming the digit under every patch of the real tiles, and the accuracy on patches that show one."""
    real = batch["aspect_ratio_mask"][:, 0].bool()
    labels = batch["patch_labels"][real].flatten()
    logits = head(features[:, :, 1:][real]).flatten(0, 1)
    weight = torch.ones(logits.shape[-1])
    weight[0] = 0.3
    shown = labels > 0
    accuracy = (logits.argmax(-1) == labels)[shown].float().mean().item()
    return F.cross_entropy(logits, labels, weight=weight), accuracy


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Loss on the answers' tokens, and the share of those tokens that are right."""
    answered = labels != -100
    chosen, wanted = logits[answered], labels[answered]
    return F.cross_entropy(chosen, wanted), (chosen.argmax(-1) == wanted).float().mean().item()


def save_checkpoint(model: MllamaForConditionalGeneration, folder: Path, record: dict[str, Any]) -> None:
    """Write model, processor and record into ``folder``, replacing it only when everything is written."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    build_processor().save_pretrained(fresh)
    write_json(fresh / "training.json", record)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


class Budget:
    """Progress of a stage, 0 to 1, by steps and, if given, by minutes, whichever is further."""

    def __init__(self, steps: int, minutes: float | None) -> None:
        self.steps, self.minutes, self.begin = steps, minutes, time.monotonic()

    def elapsed(self) -> float:
        """Minutes since the stage began."""
        return (time.monotonic() - self.begin) / 60

    def progress(self, step: int) -> float:
        """How much of the stage is done."""
        return min(1.0, max(step / self.steps, self.elapsed() / self.minutes if self.minutes else 0.0))


def rate(progress: float, step: int, peak: float, warmup: int = 150, decay_from: float = 0.6) -> float:
    """Learning rate: linear warm-up, constant, then a cosine to a hundredth over the last part of the stage."""
    down = max(0.0, (progress - decay_from) / (1 - decay_from))
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * down)))


def optimizer_for(modules: list[nn.Module]) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    parameters = [p for module in modules for p in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)


@torch.no_grad()
def average(target: nn.Module, source: nn.Module, step: int) -> None:
    """Move ``target`` towards ``source``: an exponential moving average over about 250 steps."""
    keep = min(0.996, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - keep)


def run_stage(
    name: str,
    model: MllamaForConditionalGeneration,
    head: nn.Module,
    averaged: MllamaForConditionalGeneration,
    args: argparse.Namespace,
    budget: Budget,
    record: dict[str, Any],
) -> None:
    """Train one stage ("tower" or "questions") until its budget is spent."""
    texts = name == "questions"
    data = SceneBatches(args.seed, args.batch, budget.steps, texts=texts)
    batches = DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=8)
    trained = [model, head] if texts else [model.model.vision_model, head]
    optimizer = optimizer_for(trained)
    peak = args.rate if texts else args.tower_rate
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    saved, smooth = time.monotonic(), {"loss": math.nan, "words": math.nan, "patches": math.nan}
    step = 0
    with Progress(*columns, refresh_per_second=1) as bar:
        task = bar.add_task(name, total=budget.steps, state="")
        for step, batch in enumerate(batches):
            progress = budget.progress(step)
            if progress >= 1.0:
                break
            for group in optimizer.param_groups:
                group["lr"] = rate(progress, step, peak, decay_from=args.decay_from if texts else 0.7)
            features, states = cross_attention_inputs(model, batch)
            loss, patches = patch_loss(head, features, batch)
            seen = {"patches": patches}
            if texts:
                logits = packed_logits(model, states, batch["texts"], batch["aspect_ratio_mask"])
                words_loss, seen["words"] = answer_loss(logits, batch["texts"]["labels"])
                loss = words_loss + args.patch_weight * loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for module in trained for p in module.parameters()], 1.0)
            optimizer.step()
            average(averaged, model, step)
            seen["loss"] = loss.item()
            for key, value in seen.items():
                smooth[key] = value if math.isnan(smooth[key]) else 0.97 * smooth[key] + 0.03 * value
            state = " ".join(f"{key} {value:.3f}" for key, value in smooth.items() if not math.isnan(value))
            bar.update(task, completed=step + 1, state=state)
            if args.log_every and step % args.log_every == 0:
                print(f"{name} {step} {budget.elapsed():.1f} min {state}", flush=True)
            if texts and time.monotonic() - saved > SAVE_EVERY_S:
                saved = time.monotonic()
                record["stages"][name] = {"steps": step + 1, "minutes": round(budget.elapsed(), 1), **_rounded(smooth)}
                save_checkpoint(averaged, args.out, record)
    record["stages"][name] = {"steps": step, "minutes": round(budget.elapsed(), 1), **_rounded(smooth)}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in values.items() if not math.isnan(value)}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the small Mllama on scenes of handwritten digits.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=24, help="scenes a step")
    parser.add_argument("--tower-steps", type=int, default=2500)
    parser.add_argument("--tower-minutes", type=float, help="stop stage 1 after this time, whatever its step")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--minutes", type=float, help="stop stage 2 after this time, whatever its step")
    parser.add_argument("--tower-rate", type=float, default=1.5e-3)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--decay-from", type=float, default=0.6, help="share of stage 2 after which the rate falls")
    parser.add_argument("--patch-weight", type=float, default=0.3, help="weight of the patch loss in stage 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=0, help="print a line every so many steps")
    args = parser.parse_args(arguments)

    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    processor = build_processor()
    model = build_model(build_config(processor.tokenizer), args.seed).train()
    head = nn.Linear(model.config.vision_config.vision_output_dim, 11)
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    options = {key: value for key, value in vars(args).items() if key not in ("out", "log_every", "threads")}
    record: dict[str, Any] = {"seed": args.seed, "options": options, "stages": {}}
    run_stage("tower", model, head, averaged, args, Budget(args.tower_steps, args.tower_minutes), record)
    run_stage("questions", model, head, averaged, args, Budget(args.steps, args.minutes), record)
    save_checkpoint(averaged, args.out, record)


if __name__ == "__main__":
    main()
