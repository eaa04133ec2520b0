"""What a trained model is asked about: scenes of digits, or printed pages. Whatever measures on one can measure on the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.small_model import fine, pages, questions, scenes
from benchmarks.small_model.pages import questions as page_questions
from benchmarks.small_model.pages import scenes as page_scenes
from trim_plugin.embedded import SMALL_MODEL

FOLDERS = {"fine": fine.MODEL, "pages": pages.MODEL}
"""Models that lie beside the benchmarks, by name."""


@dataclass(frozen=True)
class Task:
    """Scenes and the questions about them."""

    name: str
    draw: Callable[[int, int, bool], Any]
    """A scene from a seed, for tiles of so many pixels, held out or not."""
    ask: Callable[..., tuple[str, str]]
    """(scene, type, generator) → question and true answer."""
    types: tuple[str, ...]
    """Types of questions that training knows."""
    untrained: tuple[str, ...]
    """Types that it doesn't, for adapters to learn."""
    things: Callable[[Any], int]
    """How many things a scene shows: answers about as many are about as long."""


def _digits(seed: int, tile: int, held_out: bool) -> scenes.Scene:
    return scenes.draw_scene(seed, held_out=held_out, scale=tile // scenes.TILE)


def _page(seed: int, tile: int, held_out: bool) -> page_scenes.Page:
    if tile != page_scenes.TILE:
        raise ValueError(f"pages are drawn for tiles of {page_scenes.TILE} pixels, and this model has tiles of {tile}")
    return page_scenes.draw_page(seed, held_out=held_out)


DIGITS = Task(
    "digits",
    _digits,
    questions.ask,
    questions.TRAINED_TYPES,
    questions.UNTRAINED_TYPES,
    lambda scene: len(scene.digits),
)
PAGES = Task(
    "pages",
    _page,
    page_questions.ask,
    page_questions.TRAINED_TYPES,
    page_questions.UNTRAINED_TYPES,
    lambda page: len(page.lines),
)
TASKS = {task.name: task for task in (DIGITS, PAGES)}


def task_of(folder: Path) -> Task:
    """What the model in a folder was trained for, as its ``training.json`` says; digits where it says nothing.

    Example:
        >>> task_of(fine.MODEL).name
        'digits'
    """
    record = folder / "training.json"
    recipe = json.loads(record.read_text(encoding="utf-8")).get("recipe", {}) if record.exists() else {}
    return TASKS[recipe.get("scenes", "digits")]


def folder_of(given: str | Path) -> Path:
    """The folder of a model that is given by name ("fine", "pages") or as a folder.

    Example:
        >>> folder_of("fine").name, folder_of("runs/third").name
        ('model', 'third')
    """
    return FOLDERS.get(str(given), Path(given))


def model_name(folder: Path) -> str:
    """What a trained model is called: its folder's name, or that of the folder around one that is called "model".

    Example:
        >>> model_name(Path("runs/fine/model")), model_name(Path("runs/third"))
        ('fine', 'third')
    """
    if folder == SMALL_MODEL:
        return "shipped"
    return folder.parent.name if folder.name == "model" else folder.name


def result_name(benchmark: str, folder: Path) -> str:
    """The name of a benchmark's result about a trained model: its own about the shipped one.

    Example:
        >>> result_name("encoded", SMALL_MODEL), result_name("encoded", Path("runs/fine/model"))
        ('encoded', 'encoded-fine')
    """
    return benchmark if folder == SMALL_MODEL else f"{benchmark}-{model_name(folder)}"


__all__ = ["DIGITS", "FOLDERS", "PAGES", "TASKS", "Task", "folder_of", "model_name", "result_name", "task_of"]
