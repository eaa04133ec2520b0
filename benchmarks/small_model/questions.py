"""Questions about a scene in plain English, with their true answers in words."""

from __future__ import annotations

import numpy as np

from benchmarks.small_model.scenes import COLOURS, Scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

TRAINED_TYPES = ("colour", "count", "total", "find", "list")
"""Question types that the shipped model was trained for."""

UNTRAINED_TYPES = ("largest", "smallest")
"""Question types that it has never seen, for adapters to learn; the tokenizer knows their words."""

WORDINGS = {
    "colour": ("Which digit is {}?", "What digit is {}?", "What is the {} digit?"),
    "count": ("How many digits are {}?", "How many {}s are there?", "Count the {}s."),
    "total": ("How many digits are there?", "Count the digits."),
    "find": ("Which colour is the {}?", "What color is the {}?"),
    "list": ("Read all digits.", "Read all the digits.", "List all digits."),
    "largest": ("What is the largest digit?", "Which digit is the largest?"),
    "smallest": ("What is the smallest digit?", "Which digit is the smallest?"),
}
"""The first wording of each type is the one that evaluation uses."""


def answer(scene: Scene, kind: str, subject: str | int | None = None) -> str:
    """The true answer. ``subject`` is a colour name for "colour" and a digit for "count" and "find".

    Lists name the digits in the order of the colours (red, orange, yellow, green, cyan, blue, pink, white).
    """
    values = [digit.value for digit in scene.digits]
    if kind == "colour":
        return next((NUMBERS[d.value] for d in scene.digits if d.colour == subject), "none")
    if kind == "count":
        return NUMBERS[values.count(int(subject or 0))]
    if kind == "total":
        return NUMBERS[len(values)]
    if kind == "find":
        return ", ".join(d.colour for d in scene.digits if d.value == subject) or "none"
    if kind == "list":
        return ", ".join(f"{d.colour} {NUMBERS[d.value]}" for d in scene.digits)
    if kind == "largest":
        return NUMBERS[max(values)]
    if kind == "smallest":
        return NUMBERS[min(values)]
    raise ValueError(f"kind must be one of {TRAINED_TYPES + UNTRAINED_TYPES}, got {kind!r}")


def ask(scene: Scene, kind: str, rng: np.random.Generator, *, vary: bool = False) -> tuple[str, str]:
    """Make a question of this type and its true answer.

    Args:
        scene: the scene that is asked about.
        kind: one of :data:`TRAINED_TYPES` or :data:`UNTRAINED_TYPES`.
        rng: chooses what is asked for.
        vary: draw the wording too, and ask now and then for what the scene doesn't show.
    """
    subject: str | int | None = None
    shown = scene.digits[rng.integers(len(scene.digits))]
    absent = rng.random()
    if kind == "colour":
        subject = shown.colour
        if vary and absent < 0.06:
            subject = str(rng.choice(list(COLOURS)))
    elif kind == "count":  # one question in four is about any digit, mostly one that isn't there
        subject = int(rng.integers(10)) if absent < 0.25 else shown.value
    elif kind == "find":
        subject = shown.value
        if vary and absent < 0.06:
            subject = int(rng.integers(10))
    wordings = WORDINGS[kind]
    wording = wordings[rng.integers(len(wordings)) if vary else 0]
    return wording.format(subject), answer(scene, kind, subject)
