"""Train a variant of the small Mllama: ``python -m benchmarks.small_model.train --recipe fine --out DIR``.

The tower stage trains the vision tower with a linear head that names the digit under every patch; the questions stage trains the
whole model on questions, with the loss on answer tokens (and, lightly, still on the patches). Every few minutes two things are
written: ``DIR/checkpoint``, the moving average of the weights, which ``from_pretrained`` loads, and ``DIR/state``, with which the
same command goes on where it was, to the same weights as if it had never stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import MllamaForConditionalGeneration

from benchmarks.common.results import write_json
from benchmarks.small_model.apart import tiles_apart
from benchmarks.small_model.architecture import build_config, build_model, build_processor
from benchmarks.small_model.batches import SceneBatches
from benchmarks.small_model.losses import answer_loss, cross_attention_inputs, packed_logits, patch_loss
from benchmarks.small_model.recipes import RECIPES, Recipe, Stage
from benchmarks.small_model.state import (
    Progress,
    load_moments,
    load_progress,
    load_weights,
    replaced,
    save_state,
)
from benchmarks.small_model.warm import warm_start

CURVE_EVERY = 20
"""Steps between two points of the learning curve."""


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


class Run:
    """A training run: its model, the average of its weights, and where it is."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        """Begin a run, or go on with the one in ``out``."""
        self.recipe, self.out = recipe, out
        self.processor = build_processor(recipe.variant)
        self.model = build_model(build_config(self.processor.tokenizer, recipe.variant), recipe.seed).train()
        self.head = nn.Linear(self.model.config.vision_config.vision_output_dim, 11)
        progress = load_progress(out / "state")
        if recipe.warm and progress is None:
            from trim_plugin.embedded import load_small_model

            warm_start(self.model, load_small_model()[0])
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.modules = {"model": self.model, "head": self.head, "averaged": self.averaged}
        self.resumed = progress is not None
        self.stopping = False
        self.progress = progress or Progress()
        if self.resumed:
            load_weights(out / "state", self.modules)

    def stages(self) -> Iterator[Stage]:
        """The stages that are left, the one that the run is in first."""
        while self.progress.stage < len(self.recipe.stages):
            yield self.recipe.stages[self.progress.stage]
            now = self.progress
            self.progress = Progress(stage=now.stage + 1, stages=now.stages, curve=now.curve)

    def trained(self, stage: Stage) -> list[nn.Module]:
        """The modules that a stage trains."""
        return [self.model, self.head] if stage.texts else [self.model.model.vision_model, self.head]

    def loss(self, stage: Stage, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, float]]:
        """A batch's loss, and the shares of patches and words that are right."""
        apart = stage.apart(self.progress.step)
        reading = tiles_apart(self.model.model.vision_model) if apart else nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.bfloat16), reading:
            features, states = cross_attention_inputs(self.model, batch)
        loss, patches = patch_loss(self.head, features.float(), batch)
        seen = {"patches": patches}
        if stage.texts:
            logits = packed_logits(self.model, states.float(), batch["texts"], batch["aspect_ratio_mask"])
            words_loss, seen["words"] = answer_loss(logits, batch["texts"]["labels"])
            loss = words_loss + stage.patch_weight * loss
        return loss, seen | {"loss": loss.item()}

    def note(self, stage: Stage, seen: dict[str, float], seconds: float) -> None:
        """Count a step: running means, the learning curve, and whether a plateau is reached."""
        now = self.progress
        now.step += 1
        now.seconds += seconds
        for key, value in seen.items():
            now.smooth[key] = 0.97 * now.smooth.get(key, value) + 0.03 * value
        rounded = {key: round(value, 4) for key, value in now.smooth.items()}
        now.stages[stage.name] = {"steps": now.step, "minutes": round(now.seconds / 60, 1), **rounded}
        if now.step % CURVE_EVERY == 0:
            now.curve.append({"stage": stage.name, **now.stages[stage.name]})
        if not stage.window or now.plateau is not None:
            return
        total, *before = now.window or [0.0]
        total += seen["words" if stage.texts else "patches"]
        if now.step % stage.window == 0:
            mean = total / stage.window
            if before and mean < before[0] + stage.gain:
                now.plateau = now.step
            total, before = 0.0, [mean]
        now.window = [total, *before]

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the state and, as a complete checkpoint, the averaged weights with the record of the training."""
        save_state(self.out / "state", self.modules, optimizer, self.progress)
        save_checkpoint(self.averaged, self.processor, self.out / "checkpoint", self.record())

    def record(self) -> dict[str, Any]:
        """What ``training.json`` holds: the recipe and every stage's steps, minutes and running means."""
        return {"seed": self.recipe.seed, "recipe": asdict(self.recipe), "stages": self.progress.stages}


def save_checkpoint(
    model: MllamaForConditionalGeneration, processor: Any, folder: Path, record: dict[str, Any]
) -> None:
    """Write model, processor and record into ``folder``, replacing it only when everything is written."""
    with replaced(folder) as fresh:
        model.save_pretrained(fresh)
        processor.save_pretrained(fresh)
        write_json(fresh / "training.json", record)


def last_step(stage: Stage, progress: Progress) -> int:
    """The step at which a stage ends: its most steps, or as soon as the decay that follows a plateau is over."""
    return stage.steps if progress.plateau is None else min(stage.steps, progress.plateau + stage.decay)


def run_stage(run: Run, stage: Stage, limit: float, save_every_s: float, log_every: int) -> float:
    """Train the stage that the run is in until it is over or ``limit`` steps are done; returns how many are left of them."""
    first = run.recipe.first_batch(run.progress.stage)
    data = SceneBatches(run.recipe, stage, first + stage.steps)
    left = range(first + run.progress.step, first + stage.steps)
    batches = iter(DataLoader(data, batch_size=None, sampler=left, num_workers=1, prefetch_factor=8))
    parameters = [p for module in run.trained(stage) for p in module.parameters()]
    optimizer = optimizer_for(run.trained(stage))
    if run.progress.step:
        load_moments(run.out / "state", optimizer)
    saved = time.monotonic()
    while limit > 0 and not run.stopping and run.progress.step < last_step(stage, run.progress):
        begin, step = time.monotonic(), run.progress.step
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * stage.factor(step, last_step(stage, run.progress) - stage.decay)
        loss, seen = run.loss(stage, next(batches))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average(run.averaged, run.model, step)
        run.note(stage, seen, time.monotonic() - begin)
        limit -= 1
        if log_every and step % log_every == 0:
            print(stage.name, json.dumps(run.progress.stages[stage.name]), flush=True)
        if time.monotonic() - saved > save_every_s:
            run.save(optimizer)
            saved = time.monotonic()
    run.save(optimizer)
    return limit


def train(
    recipe: Recipe, out: Path, *, limit: float = float("inf"), save_every_s: float = 300, log_every: int = 0
) -> Run:
    """Train by a recipe, or go on with the run that ``out`` holds.

    ``limit`` stops it after so many steps, and SIGTERM after the step that it is in; both write what was reached.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = Run(recipe, out)
    before = signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stopping", True))
    try:
        _train(run, limit, save_every_s, log_every)
    finally:
        signal.signal(signal.SIGTERM, before)
    return run


def _train(run: Run, limit: float, save_every_s: float, log_every: int) -> None:
    for stage in run.stages():
        limit = run_stage(run, stage, limit, save_every_s, log_every)
        if run.progress.step < last_step(stage, run.progress):
            break


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the small Mllama on scenes of handwritten digits.")
    parser.add_argument("--recipe", choices=list(RECIPES), default="coarse")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of checkpoint and state; goes on with what it holds"
    )
    parser.add_argument("--steps", nargs="*", default=[], metavar="STAGE=STEPS", help="other most steps of a stage")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=float, default=5, help="minutes between two writes")
    parser.add_argument("--log-every", type=int, default=0, help="print a line every so many steps")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    steps = {name: int(count) for name, count in (entry.split("=") for entry in args.steps)}
    train(
        RECIPES[args.recipe].with_steps(steps), args.out, save_every_s=60 * args.save_every, log_every=args.log_every
    )  # fmt: skip


if __name__ == "__main__":
    main()
