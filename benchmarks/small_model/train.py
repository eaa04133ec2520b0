"""Train a variant of the small Mllama: ``python -m benchmarks.small_model.train --recipe fine --out DIR``.

The tower stage trains the vision tower with a linear head that names what is under every patch; the questions stage trains the
whole model on questions, with the loss on answer tokens (and, lightly, still on the patches). Every few minutes two things are
written: ``DIR/checkpoint``, the moving average of the weights, which ``from_pretrained`` loads, and ``DIR/state``, with which the
same command goes on where it was, to the same weights as if it had never stopped. ``--start`` begins a new run with the
weights of a checkpoint, where the state is lost.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import MllamaForConditionalGeneration

from benchmarks.common.results import write_json
from benchmarks.small_model import fine
from benchmarks.small_model.apart import tiles_apart
from benchmarks.small_model.architecture import build_config, build_model, build_processor
from benchmarks.small_model.batches import SceneBatches
from benchmarks.small_model.losses import DIGITS, answer_loss, packed_logits, patch_loss, projected, visual_features
from benchmarks.small_model.optimizer import OPTIMIZERS
from benchmarks.small_model.pages.labels import ASPECTS
from benchmarks.small_model.parallel import Group, run_together
from benchmarks.small_model.recipes import RECIPES, Recipe, Stage
from benchmarks.small_model.state import (
    Progress,
    load_moments,
    load_progress,
    load_weights,
    replaced,
    save_state,
)
from benchmarks.small_model.thinned import thinned
from benchmarks.small_model.warm import warm_start

CURVE_EVERY = 20
"""Steps between two points of the learning curve."""


def first_weights(source: str | Path) -> MllamaForConditionalGeneration:
    """The model whose weights a run begins with: "shipped", "fine", or the checkpoint in a folder."""
    if source == "shipped":
        from trim_plugin.embedded import SMALL_MODEL

        source = SMALL_MODEL
    elif source == "fine":
        source = fine.MODEL
    return MllamaForConditionalGeneration.from_pretrained(source)


@torch.no_grad()
def average(target: nn.Module, source: nn.Module, step: int) -> None:
    """Move ``target`` towards ``source``: an exponential moving average over about 250 steps."""
    keep = min(0.996, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - keep)


class Run:
    """A training run: its model, the average of its weights, and where it is."""

    def __init__(self, recipe: Recipe, out: Path, start: Path | None = None, group: Group | None = None) -> None:
        """Begin a run, from the weights in ``start`` if given, or go on with the one in ``out``."""
        self.recipe, self.out, self.group = recipe, out, group or Group()
        self.aspects = ASPECTS if recipe.scenes == "pages" else DIGITS
        self.processor = build_processor(recipe.variant)
        self.model = build_model(build_config(self.processor.tokenizer, recipe.variant), recipe.seed).train()
        self.head = nn.Linear(self.model.config.vision_config.vision_output_dim, sum(self.aspects.values()))
        progress = load_progress(out / "state")
        if progress is None and (start is not None or recipe.warm):
            warm_start(self.model, first_weights(start or recipe.warm))
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.modules = {"model": self.model, "head": self.head, "averaged": self.averaged}
        self.resumed = progress is not None
        self.asked_to_stop = False
        self.stopping = False  # as all processes have agreed: they stop after the same step
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
        whole = self.model.model
        if stage.frozen:
            return [whole.language_model, whole.multi_modal_projector, self.model.lm_head]
        return [self.model, self.head] if stage.texts else [whole.vision_model, self.head]

    def read(self, stage: Stage, batch: dict[str, Any]) -> torch.Tensor:
        """What the vision tower makes of a batch."""
        apart = stage.apart(self.progress.step)
        vision = self.model.model.vision_model
        reading = tiles_apart(vision) if apart else thinned(vision, batch.get("kept"))
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=stage.bfloat16),
            reading,
            torch.set_grad_enabled(not stage.frozen),
        ):
            return visual_features(self.model, batch)

    def losses(self, stage: Stage, batch: dict[str, Any]) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
        """A batch's loss, and the shares of patches and words that are right; once for every update."""
        features = self.read(stage, batch)
        for texts in batch.get("texts", [None]):
            loss, seen = torch.zeros(()), {}
            if not stage.frozen:
                loss, seen = patch_loss(self.head, features.float(), batch, self.aspects)
            if texts is not None:
                with torch.autocast("cpu", torch.bfloat16, enabled=stage.bfloat16):
                    states = projected(self.model, features).float()
                logits = packed_logits(self.model, states, texts, batch["aspect_ratio_mask"], batch.get("kept"))
                words_loss, seen["words"] = answer_loss(logits, texts["labels"])
                loss = words_loss + stage.patch_weight * loss
            yield loss, seen | {"loss": loss.item()}

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
        """Write the state and, as a complete checkpoint, the averaged weights with the record of the training.

        The first process of a group writes for all.
        """
        if self.group.rank:
            return
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
    data = SceneBatches(run.recipe, stage, first + stage.steps, run.group.rank, run.group.size)
    left = range(first + run.progress.step, first + stage.steps)
    # Forked, in spawned processes too: a worker need not import everything again.
    loader = DataLoader(
        data, batch_size=None, sampler=left, num_workers=1, prefetch_factor=8, multiprocessing_context="fork"
    )
    batches = iter(loader)
    parameters = [p for module in run.trained(stage) for p in module.parameters()]
    optimizer = OPTIMIZERS[run.recipe.optimizer](run.trained(stage))
    if run.progress.step:
        load_moments(run.out / "state", optimizer)
    saved = time.monotonic()
    while limit > 0 and not run.stopping and run.progress.step < last_step(stage, run.progress):
        begin, step = time.monotonic(), run.progress.step
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * stage.factor(step, last_step(stage, run.progress) - stage.decay)
        for loss, shares in run.losses(stage, next(batches)):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            seen = run.group.average(parameters, shares | {"asked": float(run.asked_to_stop)})
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            average(run.averaged, run.model, step)
        # Alone it stops after this step; of several, one that is asked tells the others within its next step.
        run.stopping = seen.pop("asked") > 0 or (run.asked_to_stop and run.group.size == 1)
        run.note(stage, seen, time.monotonic() - begin)
        limit -= 1
        if log_every and step % log_every == 0 and not run.group.rank:
            print(stage.name, json.dumps(run.progress.stages[stage.name]), flush=True)
        if time.monotonic() - saved > save_every_s:
            run.save(optimizer)
            saved = time.monotonic()
    run.save(optimizer)
    return limit


def train(
    recipe: Recipe,
    out: Path,
    *,
    limit: float = float("inf"),
    save_every_s: float = 300,
    log_every: int = 0,
    start: Path | None = None,
    group: Group | None = None,
) -> Run:
    """Train by a recipe, or go on with the run that ``out`` holds.

    ``limit`` stops it after so many steps, and SIGTERM after the step that it is in; both write what was reached. ``start`` is a
    checkpoint that a new run begins with, instead of the recipe's first weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = Run(recipe, out, start, group)
    before = signal.signal(signal.SIGTERM, lambda *_: setattr(run, "asked_to_stop", True))
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
    parser.add_argument("--start", type=Path, metavar="DIR", help="begin a new run with the weights of this checkpoint")
    parser.add_argument("--processes", type=int, default=1, help="processes of one thread each that share a batch")
    parser.add_argument("--threads", type=int, default=2, help="threads, if there is one process")
    parser.add_argument("--save-every", type=float, default=5, help="minutes between two writes")
    parser.add_argument("--log-every", type=int, default=0, help="print a line every so many steps")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    steps = {name: int(count) for name, count in (entry.split("=") for entry in args.steps)}
    options = {"save_every_s": 60 * args.save_every, "log_every": args.log_every, "start": args.start}
    run_together(_member, args.processes, RECIPES[args.recipe].with_steps(steps), args.out, options)


def _member(group: Group, recipe: Recipe, out: Path, options: dict[str, Any]) -> None:
    torch.set_flush_denormal(True)
    train(recipe, out, group=group, **options)


if __name__ == "__main__":
    main()
