"""Training batches: scenes, the processor's preprocessing in a fast form, and questions packed into rows.

All questions about one scene share one row of text: each is a segment that sees only itself, with positions of its own,
so the cross-attention keys of the scene are computed once and not once a question. ``check.py`` shows that this equals what
the model computes for the questions one by one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast
from transformers.models.mllama.image_processing_pil_mllama import (
    get_all_supported_aspect_ratios,
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

from benchmarks.small_model.architecture import BOS, IMAGE, build_tokenizer, prompt_ids
from benchmarks.small_model.pages.labels import marks
from benchmarks.small_model.pages.questions import training_questions
from benchmarks.small_model.pages.scenes import Page, draw_page
from benchmarks.small_model.questions import ask
from benchmarks.small_model.recipes import Recipe, Stage
from benchmarks.small_model.scenes import TILE, Scene, draw_scene
from benchmarks.small_model.thinned import chosen_tokens
from benchmarks.small_model.variants import COARSE, Variant

MAX_TILES = 4
FULL_LAYOUTS = ((2, 2), (1, 4), (4, 1))
"""Layouts that fill all four tiles."""
QUESTIONS = ("colour", "colour", "colour", "count", "count", "total", "find", "list")
"""Question types asked about every training scene."""


def image_tiles(image: Image.Image, tile: int = TILE) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
    """The image processor's work for one RGB picture.

    Returns:
        Normalized tiles (4, 3, tile, tile), the (rows, columns) of tiles, and the picture's (height, width) on its canvas.
    """
    canvas_h, canvas_w = get_optimal_tiled_canvas(image.height, image.width, MAX_TILES, tile)
    height, width = get_image_size_fit_to_canvas(image.height, image.width, canvas_h, canvas_w, tile)
    if (width, height) != image.size:
        image = image.resize((int(width), int(height)), Image.Resampling.BILINEAR)
    canvas = np.zeros((canvas_h, canvas_w, 3), dtype=np.float32)
    canvas[:height, :width] = np.asarray(image)
    rows, columns = canvas_h // tile, canvas_w // tile
    tiles = (canvas / 127.5 - 1).reshape(rows, tile, columns, tile, 3).transpose(0, 2, 4, 1, 3)
    padded = np.zeros((MAX_TILES, 3, tile, tile), dtype=np.float32)
    padded[: rows * columns] = tiles.reshape(rows * columns, 3, tile, tile)
    return padded, (int(rows), int(columns)), (int(height), int(width))


def image_inputs(images: list[Image.Image], tile: int = TILE) -> dict[str, torch.Tensor]:
    """``pixel_values``, ``aspect_ratio_ids`` and ``aspect_ratio_mask`` of one picture a sample."""
    ratios = get_all_supported_aspect_ratios(MAX_TILES)
    pixels, ids, masks = [], [], []
    for image in images:
        tiles, layout, _ = image_tiles(image, tile)
        pixels.append(tiles)
        ids.append(ratios.index(layout) + 1)
        masks.append([int(n < layout[0] * layout[1]) for n in range(MAX_TILES)])
    return {
        "pixel_values": torch.from_numpy(np.stack(pixels))[:, None],
        "aspect_ratio_ids": torch.tensor(ids)[:, None],
        "aspect_ratio_mask": torch.tensor(masks)[:, None],
    }


def patch_labels(scene: Scene | Page, variant: Variant = COARSE) -> np.ndarray:
    """What every patch shows, (4, patches a tile, aspects): the classes of the box that its centre lies in, 0 outside of all.

    A scene of digits has one aspect, 1 + the digit's value; a page has those of ``pages.labels``.
    """
    boxes: list[tuple[tuple[float, ...], tuple[int, ...]]]
    boxes = [(d.box, (d.value + 1,)) for d in scene.digits] if isinstance(scene, Scene) else [*marks(scene)]
    _, (rows, columns), (height, width) = image_tiles(scene.image, variant.tile)
    sy, sx = height / scene.image.height, width / scene.image.width
    side, patch = variant.tile // variant.patch, variant.patch
    ys = (np.arange(rows * side) + 0.5) * patch
    xs = (np.arange(columns * side) + 0.5) * patch
    aspects = len(boxes[0][1])
    grid = np.zeros((len(ys), len(xs), aspects), dtype=np.int64)
    for (left, top, right, bottom), classes in boxes:
        inside = ((ys > top * sy) & (ys < bottom * sy))[:, None] & ((xs > left * sx) & (xs < right * sx))[None]
        grid[inside] = classes
    labels = np.zeros((MAX_TILES, side * side, aspects), dtype=np.int64)
    tiles = grid.reshape(rows, side, columns, side, aspects).transpose(0, 2, 1, 3, 4)
    labels[: rows * columns] = tiles.reshape(rows * columns, side * side, aspects)
    return labels


def pack(tokenizer: PreTrainedTokenizerFast, rows: list[list[tuple[str, str]]]) -> dict[str, torch.Tensor]:
    """Pack (question, answer) pairs, one list a scene, into rows.

    Returns:
        ``input_ids``, ``position_ids``, ``segments`` (0 for padding), ``visible`` (token sees the image) and ``labels``
        (the next token within answers, else -100), each (scenes, longest row).
    """
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    packed: list[dict[str, list[int]]] = []
    for pairs in rows:
        row: dict[str, list[int]] = {key: [] for key in ("input_ids", "position_ids", "segments", "visible", "labels")}
        for number, (question, answer) in enumerate(pairs, start=1):
            prompt = prompt_ids(tokenizer, question)
            target = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            ids = prompt + target[:-1]
            row["input_ids"] += ids
            row["position_ids"] += range(len(ids))
            row["segments"] += [number] * len(ids)
            row["visible"] += [int(n >= ids.index(image_id)) for n in range(len(ids))]
            row["labels"] += [-100] * (len(prompt) - 1) + target
        packed.append(row)
    longest = max(len(row["input_ids"]) for row in packed)
    fill = {"input_ids": tokenizer.pad_token_id, "position_ids": 0, "segments": 0, "visible": 0, "labels": -100}
    return {
        key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in packed])
        for key, value in fill.items()
    }


class SceneBatches(Dataset[dict[str, Any]]):
    """Batch number ``n`` of a run's stage: the same for the same recipe."""

    def __init__(self, recipe: Recipe, stage: Stage, length: int, part: int = 0, parts: int = 1) -> None:
        """Batches of a stage without questions hold the patch labels only.

        A process that is one of ``parts`` gets every so manieth scene of a batch, beginning with number ``part``.
        """
        if recipe.batch % parts:
            raise ValueError(f"a batch of {recipe.batch} scenes can't be shared out equally to {parts} processes")
        self.recipe, self.stage, self.length = recipe, stage, length
        self.part, self.parts = part, parts
        self.tokenizer = build_tokenizer()

    def __len__(self) -> int:
        return self.length

    def scene(self, seed: int) -> Scene | Page:
        """The training scene of a seed."""
        if self.recipe.scenes == "pages":
            return self.page(seed)
        scale = self.recipe.variant.scale
        if not self.stage.texts:  # the tower learns digits: every tile is real and as many digits as possible are shown
            return draw_scene(seed, held_out=False, layout=FULL_LAYOUTS[seed % 3], count=8, scale=scale)
        if self.stage.crowded and seed % 2:
            return draw_scene(seed, held_out=False, layout=FULL_LAYOUTS[seed % 3], count=5 + seed // 2 % 4, scale=scale)
        return draw_scene(seed, held_out=False, scale=scale)

    def page(self, seed: int) -> Page:
        """The training page of a seed: the tower's are full, and half of the crowded ones nearly so."""
        if not self.stage.texts:
            return draw_page(seed, held_out=False, layout=(2, 2), lines=8 - seed % 3)
        if self.stage.crowded and seed // self.parts % 2:
            return draw_page(seed, held_out=False, layout=(2, 2), lines=5 + seed // 2 % 4)
        return draw_page(seed, held_out=False)

    def questions(self, scene: Scene | Page, rng: np.random.Generator) -> list[tuple[str, str]]:
        """What training asks about a scene."""
        if isinstance(scene, Page):
            return training_questions(scene, rng)
        return [ask(scene, kind, rng, vary=True) for kind in QUESTIONS]

    def __getitem__(self, number: int) -> dict[str, Any]:
        texts, size = self.stage.texts, self.recipe.batch
        first = (self.recipe.seed * 2 + int(texts)) * 10_000_000
        seeds = range(first + number * size, first + (number + 1) * size)[self.part :: self.parts]
        scenes = [self.scene(seed) for seed in seeds]
        batch: dict[str, Any] = image_inputs([scene.image for scene in scenes], self.recipe.variant.tile)
        batch["patch_labels"] = torch.from_numpy(
            np.stack([patch_labels(scene, self.recipe.variant) for scene in scenes])
        )
        if self.stage.tokens:
            rng = np.random.default_rng([first, number, self.part, 1])
            kept = [chosen_tokens(labels, self.stage.tokens, rng) for labels in batch["patch_labels"].numpy()]
            batch["kept"] = torch.from_numpy(np.stack(kept))
        if texts:
            rng = np.random.default_rng([first, number, *([self.part] if self.parts > 1 else [])])
            batch["texts"] = [
                pack(self.tokenizer, [self.questions(scene, rng) for scene in scenes])
                for _ in range(self.stage.repeats)
            ]
        return batch


__all__ = ["BOS", "IMAGE", "QUESTIONS", "SceneBatches", "image_inputs", "image_tiles", "pack", "patch_labels"]
